"""cuda_src/several.cu on a CPU: ranks and their CTAs as threads, each with a copy of the harness of its own."""
from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cpp
import numpy as np
from decode_on_cpu import HARNESS, LOG2_E, Step, address, aligned

from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR
from gpu.kernels.launch import Arguments
from gpu.several import inbox
from gpu.several.inbox import HEAD_BYTES, OWNERS, RankConfig
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.shares import WHOLE, PageShares


@functools.cache
def build(config: RankConfig) -> tuple[Path, str]:
    """(folder, name) of the library that each instance loads a copy of."""
    folder = Path(tempfile.mkdtemp(prefix="pkv_several_"))
    for path in SOURCE_DIR.glob("*.cu*"):
        shutil.copy(path, folder)
    (folder / "mma.cuh").write_text("")
    defines = config.defines() | {"BALANCED": 1, "CONVERTS_E4M3": 1}
    cpp.build(HARNESS, folder / "several.so", "-std=c++20", "-O1", "-w", f"-I{folder}", f"-I{HARNESS.parent}",
              *(f"-D{name}={value}" for name, value in defines.items()))
    return folder, "several.so"


@functools.cache
def instance(config: RankConfig, number: int) -> ctypes.CDLL:
    """A copy with memory, threads and barriers of its own."""
    folder, name = build(config)
    library = ctypes.CDLL(str(shutil.copy(folder / name, folder / f"{number}_{name}")))
    library.run.restype = library.merge.restype = ctypes.c_char_p
    return library


@dataclass(slots=True)
class Rank:
    """One rank's memory."""

    table: np.ndarray  # [batch_size, local pages] int32
    lens: np.ndarray  # [batch_size] int32, of whole rows, or this rank's own
    inbox: np.ndarray
    workspace: np.ndarray
    failure: np.ndarray
    out: np.ndarray
    lse: np.ndarray


class Ranks:
    """The ranks of a step, with their memory from one launch to the next."""

    def __init__(self, step: Step, config: RankConfig, shares: PageShares, *, ctas: int, owner: str = "head",
                 patience_ns: int = 20_000_000_000, in_kernel: bool = True, same_gpu: bool = False) -> None:
        self.config, self.shares, self.ctas, self.owner = config, shares, ctas, owner
        self.patience_ns, self.in_kernel, self.same_gpu = patience_ns, in_kernel, same_gpu
        filled = [aligned(np.full(config.inbox_bytes + 128, 0xFF, np.uint8)) for _ in range(config.num_ranks)]
        boxes = [box[-box.ctypes.data % 128:][:config.inbox_bytes] for box in filled]
        self.ranks = [Rank(None, None, box, aligned(np.full(config.workspace_bytes(ctas), 0xFF, np.uint8)),
                           np.full(1, 0xFFFFFFFF, np.uint32), None, None) for box in boxes]
        self.addresses = np.array([address(box) for box in boxes], np.int64)
        self.set(step)

    def set(self, step: Step) -> None:
        """Another step, of which each rank gets its share of the table."""
        self.step = step
        pages = np.arange(step.table.shape[1])
        of, place = self.shares.place(pages)
        for r, rank in enumerate(self.ranks):
            rank.table = np.full((len(step.lens), max(1, int((of == r).sum()))), 0x7FFFFFFF, np.int32)
            rank.table[:, place[of == r]] = step.table[:, of == r]
            rank.lens = step.lens.copy()

    def clear(self) -> None:
        for rank in self.ranks:
            rank.out = np.full((*self.step.q.shape[:-1], self.config.kernel.v_dim), np.nan, self.step.q.dtype)
            rank.lse = np.full(self.step.q.shape[:-1], np.nan, np.float32)

    def launch(self, *, but: tuple[int, ...] = (), seed: int = 1) -> None:
        """A launch on every rank, or on all but some, each CTA a thread; complaints fail the test."""
        self.clear()
        complaints: list[bytes] = []
        threads = []
        for r in range(self.config.num_ranks):
            for cta in range(self.ctas if r not in but else 0):
                library = instance(self.config, r * self.ctas + cta)
                call = functools.partial(self._run, library, r, cta, seed, complaints)
                threads.append(threading.Thread(target=call))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not complaints, complaints

    def launch_apart(self, steps: int, *, seed: int = 1, delay_s: float = 0.0) -> list[set[bytes]]:
        """So many launches of every rank, each rank's one after the other and delayed at random by up to delay_s, no rank
        waiting for another but in the kernel. Returns what each rank's launches gave, in bytes."""
        self.clear()
        complaints: list[bytes] = []
        found: list[set[bytes]] = [set() for _ in self.ranks]
        threads = []
        for r, rank in enumerate(self.ranks):
            random = np.random.default_rng(seed + r)

            def ended(r=r, rank=rank, random=random) -> None:  # all CTAs of the rank's launch
                found[r].add(rank.out.tobytes() + rank.lse.tobytes())
                rank.out.fill(np.nan), rank.lse.fill(np.nan)
                time.sleep(random.uniform(0, delay_s) if random.random() < 0.5 else 0.0)

            barrier = threading.Barrier(self.ctas, action=ended)

            def run(cta: int, r=r, barrier=barrier) -> None:
                for step in range(steps):
                    self._run(instance(self.config, r * self.ctas + cta), r, cta, seed + 1000 * step, complaints)
                    barrier.wait(timeout=120)

            threads += [threading.Thread(target=run, args=(cta,)) for cta in range(self.ctas)]
        for number in range(len(self.ranks) * self.ctas):
            instance(self.config, number)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not complaints, complaints
        return found

    def _run(self, library, r: int, cta: int, seed: int, complaints: list) -> None:
        given, of_rank = self.arguments(r)
        sizes = (cta, self.ctas, seed + 77 * r + cta, *BalancedCosts(1, 2), self.ranks[r].table.shape[1]
                 * self.step.shape.page_size)
        told = library.run(ctypes.c_void_p(given.starts[0]), ctypes.c_void_p(of_rank.starts[0]),
                           (ctypes.c_int * len(sizes))(*sizes))
        if told is not None:
            complaints.append(told)

    def arguments(self, r: int) -> tuple[Arguments, Arguments]:
        step, shape, options, rank = self.step, self.step.shape, self.step.options, self.ranks[r]
        cap, base = options.soft_cap, shape.head_dim**-0.5
        scale, height = (base * LOG2_E, 0.0) if cap is None else (base / cap, cap * LOG2_E)
        strides = {f"{name}_{axis}_stride": pool.strides[i] // pool.itemsize
                   for name, pool in (("k", step.k), ("v", step.v)) for i, axis in enumerate(("page", "head", "token"))}
        by_token = options.kv_scales in ("page", "token")
        scale_strides = [stride // 4 for stride in step.k_scales.strides] if by_token else []
        share = WHOLE if self.shares is None else self.shares.of_rank(r)
        values = {
            "q": address(step.q), "k_pages": address(step.k), "v_pages": address(step.v),
            "page_ids": address(rank.table), "lengths": address(rank.lens), "query_lens": 0,
            "sinks": address(step.sinks), "out": address(rank.out), "lse": address(rank.lse),
            "partials": address(rank.workspace), **strides, "batch_size": len(step.lens),
            "num_kv_heads": shape.num_kv_heads * self.config.kernel.head_split, "table_stride": rank.table.shape[1],
            "num_pages": len(step.k), "window": 0, "scale": scale, "cap": height, "k_scales": address(step.k_scales),
            "v_scales": address(step.v_scales), "v_scale": 1.0,
            **dict(zip(("scale_page_stride", "scale_head_stride", "scale_token_stride"), (*scale_strides, 0, 0, 0))),
            "inboxes": address(self.addresses), "own": int(self.addresses[r]), "failure": address(rank.failure),
            "half_slots": self.config.half_slots, "patience_ns": self.patience_ns, "rank": r,
            "owner": OWNERS[self.owner], "in_kernel": int(self.in_kernel), "same_gpu": int(self.same_gpu),
            **dict(zip(("share_begin", "share_tokens", "share_cycle", "share_magic", "share_shift"), share.numbers()))}
        if not self.in_kernel:
            self.addresses_of_own = getattr(self, "addresses_of_own", {})
            alone = self.addresses_of_own.setdefault(r, np.full(len(self.ranks), self.addresses[r], np.int64))
            values["inboxes"] = address(alone)
        written = []
        for parameter in (fields.DECODE, fields.RANK):
            present = fields.present(parameter, self.config.defines())
            one = Arguments(f"[{''.join(field.letter for field in present)}]")
            one.write(*(values[field.name] for field in present))
            written.append(one)
        library = instance(self.config, 0)
        assert library.arguments_bytes() == written[0].num_bytes
        assert library.rank_arguments_bytes() == written[1].num_bytes
        assert library.inbox_bytes() == HEAD_BYTES
        assert library.opened_bytes() == inbox.opened_bytes(self.config.num_ranks)
        return written[0], written[1]

    def merge_exchanged(self) -> None:
        """What the host does where ranks do not reach each other: all-to-all of states, then pkv_merge_ranks."""
        config, step = self.config, self.step
        heads = step.shape.num_kv_heads * config.kernel.head_split
        size, places = config.kernel.state_bytes, len(step.lens) * heads
        left = [rank.inbox[HEAD_BYTES:][:places * size].reshape(places, size) for rank in self.ranks]
        for r in range(len(self.ranks)):
            begin, end = inbox.owned_places(self.owner, r, num_ranks=config.num_ranks, batch_size=len(step.lens),
                                            num_kv_heads=step.shape.num_kv_heads, head_split=config.kernel.head_split)
            states = aligned(np.concatenate([source[begin:end] for source in left]))
            given, _ = self.arguments(r)
            told = instance(config, 0).merge(ctypes.c_void_p(given.starts[0]), ctypes.c_void_p(address(states)),
                                             (ctypes.c_int * 3)(end - begin, r, OWNERS[self.owner]))
            assert told is None, told

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) float64 put together of what each rank owns; what it does not own must be left alone, and what
        all own must be the same bits."""
        step = self.step
        out, lse = (np.full(array.shape, np.nan) for array in (self.ranks[0].out, self.ranks[0].lse))
        group = step.shape.group_size
        for r, rank in enumerate(self.ranks):
            rows, heads = inbox.owned(self.owner, r, num_ranks=len(self.ranks), batch_size=len(step.lens),
                                      num_kv_heads=step.shape.num_kv_heads)
            here = np.zeros(step.q.shape[:-1], bool)
            here[rows.start:rows.stop, heads.start * group:heads.stop * group] = True
            assert np.isnan(rank.lse[~here]).all() and np.isnan(rank.out[~here].astype(np.float64)).all()
            out[here], lse[here] = rank.out[here].astype(np.float64), rank.lse[here]
        if self.owner == "all":
            assert len({rank.out.tobytes() + rank.lse.tobytes() for rank in self.ranks}) == 1
        return out, lse

    def left_empty(self) -> bool:
        slots = self.config.kernel.slots_bytes(self.ctas)
        return all((rank.inbox[HEAD_BYTES:] == 0xFF).all() and (rank.workspace[:slots] == 0xFF).all()
                   for rank in self.ranks)

