"""A decode loop on real pages: rows grow, end and are replaced, and every so often the result is checked.

    python examples/quickstart.py [--steps 200] [--schedule auto]

Without a GPU it says what is missing and runs the CPU reference on a small case instead.
"""
from __future__ import annotations

import argparse
import sys

import numpy as np
from bench.script import one_line_errors
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from gpu.measure.environment import missing
from pkvsim import DecodeShape, make_schedule, reference

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
MAX_ROWS, MAX_SEQ_LEN, PROMPTS, DECODES = 16, 16384 + 512, (2048, 16384), (40, 160)
TOLERANCE = 2e-3


def run_on_cpu(console: Console, reason: str) -> None:
    console.print(f"[bold]No GPU run:[/] {escape(reason)}. The CPU reference on a small case instead:")
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
    rng = np.random.default_rng(0)
    seq_lens = np.array([700, 0, 33, 260], dtype=np.int32)
    pages = -(-seq_lens // shape.page_size)
    ids = iter(rng.permutation(int(pages.sum())))
    block_table = np.zeros((len(seq_lens), pages.max()), dtype=np.int32)
    for row, count in enumerate(pages):
        block_table[row, :count] = [next(ids) for _ in range(count)]
    q = rng.standard_normal((len(seq_lens), shape.num_q_heads, shape.head_dim))
    k_pages, v_pages = rng.standard_normal((2, int(pages.sum()), shape.num_kv_heads, shape.page_size, shape.head_dim))
    step = (shape, q, k_pages, v_pages, block_table, seq_lens)
    expected, _ = reference.attention(*step)
    table = Table("schedule", "tasks", "launches", "partial slots", "largest difference")
    for name, options in (("split", {"splits": 4}), ("workqueue", {"splits": 4}), ("balanced", {"num_ctas": 28})):
        schedule = make_schedule(name, shape, seq_lens, **options)
        out, _ = reference.run_schedule(schedule, *step)
        table.add_row(name, str(len(schedule.tasks)), str(schedule.num_launches), str(schedule.num_partial_slots),
                      f"{np.abs(out - expected).max():.1e}")
    console.print(table)


def error_of_row(cache, row: int, q_row, out_row) -> float:
    """Largest difference of one row from the float64 reference on the CPU."""
    length = int(cache.seq_lens[row])
    pages = -(-length // SHAPE.page_size)
    ids = cache.block_table[row, :pages]
    k_pages, v_pages = (pool[ids].get().astype(np.float64) for pool in (cache.k_pages, cache.v_pages))
    table = np.arange(pages, dtype=np.int32)[None]
    expected, _ = reference.attention(SHAPE, q_row.get()[None].astype(np.float64), k_pages, v_pages, table,
                                      np.array([length], dtype=np.int32))
    return float(np.abs(out_row.get() - expected[0]).max())


def compare_with_flashinfer(console: Console, cache, q, out) -> tuple[float, float | None]:
    """(largest difference from `out`, us) of FlashInfer's tensor-core backend; (0, None) where it cannot run.

    Why it cannot is said on the console.
    """
    import torch

    from gpu.inputs.block_tables import StepTables
    from gpu.inputs.run import Run
    from gpu.measure.timing import graph_time_us, shared_stream
    from gpu.routes.route_engines import RouteUnavailable, build

    try:
        theirs = build("flashinfer_tensor_core", SHAPE)
    except RouteUnavailable as error:
        console.print(f"No comparison with FlashInfer: {escape(str(error))}")
        return 0.0, None
    arrays = [torch.from_dlpack(array) for array in (q, cache.k_pages, cache.v_pages)]
    their_out = torch.empty_like(arrays[0])
    with shared_stream():
        theirs.plan(StepTables(cache.seq_lens, torch.from_dlpack(cache.device_tables()[1])))
    timing = graph_time_us(lambda _: theirs.run(Run(*arrays, out=their_out)), variants=1)
    return float((their_out.float() - torch.from_dlpack(out).float()).abs().max()), timing.median_us


def run_on_gpu(console: Console, *, steps: int, schedule: str, seed: int) -> int:
    import cupy

    from gpu import DecodeEngine, PagedKVCache
    from gpu.kernels.this_gpu import this_gpu
    from gpu.measure import memory
    from gpu.measure.timing import graph_time_us

    rng = np.random.default_rng(seed)
    random = cupy.random.RandomState(seed)

    def tokens(count: int, heads: int = SHAPE.num_kv_heads):  # [count, heads, head_dim] float16
        return random.standard_normal((count, heads, SHAPE.head_dim), dtype=cupy.float32).astype(cupy.float16)

    pages = -(-MAX_SEQ_LEN // SHAPE.page_size)
    page_bytes = 2 * SHAPE.num_kv_heads * SHAPE.page_size * SHAPE.head_dim * 2
    rows = memory.fitting(MAX_ROWS, bytes_each=pages * page_bytes)
    cache = PagedKVCache(SHAPE, num_pages=rows * pages, max_batch=rows, max_seq_len=MAX_SEQ_LEN)
    engine = DecodeEngine(SHAPE, dtype="float16", schedule=schedule)
    left = np.zeros(rows, dtype=np.int64)  # decode steps until a row ends

    def refill() -> int:
        ended = np.flatnonzero(left == 0)
        for row in ended.tolist():
            cache.allocate(row)
            prompt = int(rng.integers(*PROMPTS))
            cache.fill(row, tokens(prompt), tokens(prompt))
            left[row] = rng.integers(*DECODES)
        return len(ended)

    replaced, worst = refill() - rows, 0.0
    q = out = None
    for step in track(range(steps), "decoding", console=console, disable=not console.is_terminal, transient=True):
        for row in np.flatnonzero(left == 0).tolist():
            cache.free(row)
        replaced += refill()
        cache.append(np.arange(rows), tokens(rows), tokens(rows))
        q = tokens(rows, SHAPE.num_q_heads)
        engine.plan(*cache.device_tables())
        out, _ = engine.run(q, cache.k_pages, cache.v_pages)
        if step % 20 == 0 or step == steps - 1:
            row = int(rng.integers(rows))
            worst = np.maximum(worst, error_of_row(cache, row, q[row], out[row]))  # a NaN stays one
        left -= 1

    useful = 2 * int(cache.seq_lens.sum()) * SHAPE.num_kv_heads * SHAPE.head_dim * 2
    cupy.cuda.Device().synchronize()
    timing = graph_time_us(lambda _: engine.run(q, cache.k_pages, cache.v_pages, out=out), variants=1)
    table = Table("engine", "schedule", "us per step", "GB/s", "largest error", title=f"last step: {rows} rows, "
                  f"{int(cache.seq_lens.min())} to {int(cache.seq_lens.max())} tokens, {useful / 2**20:.0f} MiB of KV")
    table.add_row("PersistentKV", engine.schedule, f"{timing.median_us:.1f}", f"{useful / timing.median_us / 1e3:.0f}",
                  f"{worst:.1e} (float64)")
    agrees = worst < TOLERANCE
    difference, us = compare_with_flashinfer(console, cache, q, out)
    if us is not None:
        table.add_row("FlashInfer", "tensor_core", f"{us:.1f}", f"{useful / us / 1e3:.0f}",
                      f"{difference:.1e} (from ours)")
        agrees &= difference < TOLERANCE
    if rows < MAX_ROWS:
        console.print(f"{rows} rows in place of {MAX_ROWS}, for which GPU memory has no room.")
    console.print(f"{this_gpu()}: {steps} steps, {replaced} rows ended "
                  f"and were replaced, {cache.num_free_pages} pages free")
    console.print(table)
    console.print(memory.peak_line())
    console.print("[green]results agree[/]" if agrees else f"[red]results differ by more than {TOLERANCE}[/]")
    return 0 if agrees else 1


@one_line_errors("quickstart")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--schedule", default="auto", choices=("auto", "balanced", "workqueue", "split"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    console = Console()
    reason = missing()
    if reason is not None:
        run_on_cpu(console, reason)
        return 0
    return run_on_gpu(console, steps=args.steps, schedule=args.schedule, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
