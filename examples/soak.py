"""Decodes for as many steps as asked, rows growing, ending and being replaced, and watches results and memory.

    python examples/soak.py [--steps 100000] [--json soak.json]

Every step appends a token to each row and attends, by replaying one captured CUDA graph. Every --check steps the step
is replayed again: its checksum must repeat bit for bit, one row must be float64 attention, and neither the GPU nor the
host may hold 64 MiB more than at the most of the first --settle checks. Exits with 1 where any of that fails. Before
host memory is read, the C library gives back what a check's float64 copies have left free in it, up to 60 MiB.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from bench.script import one_line_errors
from bench.tables import Table
from rich.console import Console

from gpu.measure import memory
from gpu.measure.environment import environment, lacks_gpu, write_json
from gpu.measure.progress import note, tracked
from pkvsim import DecodeShape, reference

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
MAX_ROWS, MAX_SEQ_LEN = 16, 4096
PROMPTS, DECODES = (16, 3000), (20, 800)  # tokens, [from, to)
TOLERANCE = 2e-3
SLACK_BYTES = 64 << 20  # allocators keep what they had at a peak; a leak of 1 KiB a step is more


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """What a check saw. checksum: CRC-32 of the step's output and LSE; error: of one row, from float64."""

    step: int
    tokens: int  # in the cache
    checksum: int
    repeats: bool
    error: float
    gpu_bytes: int  # in use on the whole GPU
    host_bytes: int  # resident of this process
    python_blocks: int  # pieces of memory that Python's objects hold
    seconds: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--check", type=int, default=500, metavar="STEPS", help="steps from one check to the next")
    parser.add_argument("--settle", type=int, default=5, metavar="CHECKS", help="checks before memory may grow no more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every check and the environment here")
    args = parser.parse_args(argv)
    for name in ("steps", "check", "settle"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


def failures(marks: list[Mark], *, settle: int) -> list[str]:
    """What is wrong with a run, in sentences; memory is compared with the most that the first `settle` checks saw."""
    found = [f"step {mark.step}: the same step gave another result" for mark in marks if not mark.repeats]
    found += [f"step {mark.step}: error {mark.error:.2e}, expected at most {TOLERANCE:g}" for mark in marks
              if not mark.error <= TOLERANCE]  # NaN fails too
    settled, later = marks[:settle], marks[settle:]
    for what in ("gpu_bytes", "host_bytes"):
        most = max((getattr(mark, what) for mark in settled), default=0) + SLACK_BYTES
        grown = next((mark for mark in later if getattr(mark, what) > most), None)
        if grown is not None:
            found.append(f"step {grown.step}: {what} {getattr(grown, what):,}, expected at most {most:,}")
    return found


def resident_bytes() -> int:
    """Memory of this process, Linux, after glibc has given back what lies free in its heap: arrays of tens of MiB leave
    so much there that two readings of one process would differ by almost SLACK_BYTES."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library of another kind keeps less, or cannot be asked
        ctypes.CDLL(None).malloc_trim(0)
    words = Path("/proc/self/status").read_text(encoding="ascii").split("VmRSS:", 1)[1].split()
    return int(words[0]) * 1024  # the kernel counts in kB of 1024 bytes


def growth(marks: list[Mark], *, settle: int) -> str:
    """How much memory a step has cost since the checks of `settle`, and what it holds, in a sentence."""
    first, last = marks[min(settle, len(marks)) - 1], marks[-1]
    steps = max(1, last.step - first.step)
    host, blocks = last.host_bytes - first.host_bytes, last.python_blocks - first.python_blocks
    return (f"since step {first.step:,} host memory grew by {host / steps:,.0f} bytes a step, Python's objects by "
            f"{blocks / steps:.3f} pieces")


def table(marks: list[Mark]) -> Table:
    """At most a dozen of the checks, the first and the last among them."""
    chosen = sorted({round(at) for at in np.linspace(0, len(marks) - 1, min(12, len(marks)))})
    rows = tuple((f"{m.step:,}", f"{m.tokens:,}", f"{m.checksum:08x}", f"{m.error:.1e}", f"{m.gpu_bytes / 2**20:,.0f}",
                  f"{m.host_bytes / 2**20:,.0f}", f"{m.python_blocks:,}", f"{m.seconds:.0f}")
                 for m in (marks[at] for at in chosen))
    return Table(f"{len(marks)} checks",
                 ("step", "tokens", "checksum", "error", "GPU MiB", "host MiB", "pieces", "s"), rows)


class Soak:
    """The pool, the arrays of the captured step, and which rows end when."""

    def __init__(self, seed: int) -> None:
        import cupy

        from gpu import CacheWriter, DecodeEngine, PagedKVCache
        from gpu.measure.timing import capture

        self.rng, self.random = np.random.default_rng(seed), cupy.random.RandomState(seed)
        pages = -(-MAX_SEQ_LEN // SHAPE.page_size)
        page_bytes = 2 * SHAPE.num_kv_heads * SHAPE.page_size * SHAPE.head_dim * 2
        self.rows = rows = memory.fitting(MAX_ROWS, bytes_each=pages * page_bytes)
        self.cache = PagedKVCache(SHAPE, num_pages=rows * pages, max_batch=rows, max_seq_len=MAX_SEQ_LEN)
        writer, engine = CacheWriter(SHAPE), DecodeEngine(SHAPE)
        kv, heads = (rows, SHAPE.num_kv_heads, SHAPE.head_dim), (rows, SHAPE.num_q_heads, SHAPE.head_dim)
        self.k_new, self.v_new = (cupy.zeros(kv, dtype=cupy.float16) for _ in range(2))
        self.q, self.out = (cupy.zeros(heads, dtype=cupy.float16) for _ in range(2))
        self.lse = cupy.zeros(heads[:2], dtype=cupy.float32)
        self.left = np.zeros(rows, dtype=np.int64)  # steps until a row ends
        seq_lens, block_table = self.cache.device_tables()

        def step() -> None:
            writer.append(self.k_new, self.v_new, self.cache.k_pages, self.cache.v_pages, seq_lens=seq_lens,
                          block_table=block_table)
            engine.plan(seq_lens, block_table)
            engine.run(self.q, self.cache.k_pages, self.cache.v_pages, out=self.out, lse=self.lse)

        step()  # on empty rows: compiles and checks outside the capture
        self.graph = capture(step)
        self._kept = writer, engine  # the graph reads what they own

    def tokens(self, *shape: int) -> object:
        """[*shape, head_dim] float16 on the GPU."""
        import cupy

        return self.random.standard_normal((*shape, SHAPE.head_dim), dtype=cupy.float32).astype(cupy.float16)

    def step(self) -> None:
        """Replaces the rows that ended, gives every row a token and attends."""
        for row in np.flatnonzero(self.left == 0).tolist():
            if self.cache.seq_lens[row]:
                self.cache.free(row)
            self.cache.allocate(row)
            prompt = int(self.rng.integers(*PROMPTS))
            # Drawn at one size, so that the allocator meets few.
            self.cache.fill(row, *(self.tokens(PROMPTS[1], SHAPE.num_kv_heads)[:prompt] for _ in range(2)))
            self.left[row] = self.rng.integers(*DECODES)
        self.cache.reserve(np.arange(self.rows), np.ones(self.rows, dtype=np.int64))
        for static in (self.k_new, self.v_new, self.q):
            static[:] = self.tokens(*static.shape[:2])
        self.cache.device_tables()
        self.graph.replay()
        self.left -= 1

    def checksum(self) -> int:
        return zlib.crc32(self.lse.get().tobytes(), zlib.crc32(self.out.get().tobytes()))

    def error(self) -> float:
        """Largest difference of one row from float64."""
        row = int(self.rng.integers(self.rows))
        length = int(self.cache.seq_lens[row])
        ids = self.cache.block_table[row, :-(-length // SHAPE.page_size)]
        pools = (pool[ids].get().astype(np.float64) for pool in (self.cache.k_pages, self.cache.v_pages))
        expected, _ = reference.attention(SHAPE, self.q[row].get()[None].astype(np.float64), *pools,
                                          np.arange(len(ids), dtype=np.int32)[None], np.array([length], np.int32))
        return float(np.abs(self.out[row].get() - expected[0]).max())

    def mark(self, step: int, started: float) -> Mark:
        import cupy
        import torch

        cupy.cuda.get_current_stream().synchronize()
        first = self.checksum()
        self.graph.replay()
        again, error = self.checksum(), self.error()
        free, total = torch.cuda.mem_get_info()
        return Mark(step=step, tokens=int(self.cache.seq_lens.sum()), checksum=first, repeats=again == first,
                    error=error, gpu_bytes=total - free, host_bytes=resident_bytes(),
                    python_blocks=sys.getallocatedblocks(), seconds=time.perf_counter() - started)


def soak(args: argparse.Namespace) -> tuple[list[Mark], int]:
    """The checks, and how many rows decoded."""
    from gpu.measure.timing import shared_stream

    marks: list[Mark] = []
    with shared_stream():
        run, started = Soak(args.seed), time.perf_counter()
        for step in tracked(range(1, args.steps + 1), "soaking"):
            run.step()
            if step % args.check == 0 or step == args.steps:
                marks.append(run.mark(step, started))
    return marks, run.rows


@one_line_errors("soak")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if lacks_gpu("soak"):
        return 1
    about = environment()
    marks, rows = soak(args)
    wrong = failures(marks, settle=args.settle)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    table(marks).print(console)
    console.print(growth(marks, settle=args.settle))
    if args.json is not None:
        write_json(args.json, {"environment": about, "rows": rows, "peak_gpu_bytes": memory.peak_bytes(),
                               "failures": wrong, "checks": [dataclasses.asdict(mark) for mark in marks]})
    for sentence in wrong:
        note(sentence)
    console.print(f"{args.steps:,} steps: {'[red]failed[/]' if wrong else '[green]right, and no growth of memory[/]'}")
    if rows < MAX_ROWS:
        console.print(f"{rows} rows in place of {MAX_ROWS}, for which GPU memory has no room")
    console.print(memory.peak_line())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
