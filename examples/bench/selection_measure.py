"""Steps that read selected pages, beside the dense step and FlashInfer's decode with heads folded into the batch."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from gpu import DecodeEngine, PageList, PageSelector, PageSummaries
from gpu.measure import memory
from gpu.measure.cases import StepCase, lay_out
from gpu.measure.pools import BenchPool
from gpu.measure.timing import StreamLimit, graph_time_us, l2_bytes, rotation_length
from gpu.routes import flashinfer_decode as fi
from gpu.routes.flashinfer_builds import why_not
from pkvsim import DecodeShape
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.selection import by_name
from pkvsim.selection.rules import Budget, Pins

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
CELLS = ((64, 32768), (8, 32768), (1, 131072), (1, 4096))  # rows, tokens of each
PINS = Pins(1, 2)
SKEW = 8  # of the skewed budgets: half the heads read so many times what the others do
TOLERANCE = 2e-3
MOST_LAYERS = 8
CHECKED = 6  # (row, KV head)s of a checked result
# Methods and the dtypes of their summaries, by what names of times end in.
FORMS = {"": ("mean_std", None), "_8bit": ("mean_std", "uint8"), "_centroids": ("centroids", None)}
FLASHINFER = ("tensor_core", "cuda_core")


def summary_bytes(pages_bytes: int) -> int:
    """Bytes of the largest summaries of K pages that take so many: as much as two vectors in 16 bits for a page's
    tokens, which are centroids' codes, and a sixteenth of that for their scales."""
    return pages_bytes * 2 // SHAPE.page_size * 17 // 16


def beside(summaries: int = 1) -> float:
    """Bytes that a cell allocates for each of the pool's, these included. summaries: of each layer, whose view of K is
    a quarter of the pool."""
    return 1 + summaries * MOST_LAYERS * summary_bytes(1 << 20) / (4 << 20)


@dataclass(slots=True)
class Result:
    """Times of one cell, microseconds, by name, and what there is to say of those that are missing."""

    rows: int
    length: int
    fraction: float
    dense_bytes: int
    limit_us: float  # of the dense step's bytes
    times: dict[str, float] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.rows} x {self.length}, {self.fraction:.0%}"

    def over_dense(self, name: str) -> float | None:
        return self.times[name] / self.times["dense"] if name in self.times else None


class SelectionBench:
    """One pool, and the cells measured on it."""

    def __init__(self, *, pool_gib: float, repeats: int, fraction: float) -> None:
        self.pool = BenchPool(pool_gib=pool_gib, dtype=torch.float16, seed=1)
        self.limit, self.repeats = StreamLimit(self.pool.flat), repeats
        self.budget = Budget(fraction, 0)

    def measure(self, rows: int, length: int, *, flashinfer: bool = True) -> Result:
        lens = np.full(rows, length, np.int32)
        # As many layers as make what is read of each cold again, but no more than there is room for their summaries.
        read = max(1, int(useful_kv_bytes(SHAPE, lens) * self.budget.fraction))
        layers = min(MOST_LAYERS, rotation_length(read, l2_size=l2_bytes()))
        case = lay_out(self.pool, SHAPE, lens, seed=rows, min_layers=layers)
        memory.expect_room(sum(summary_bytes(k.nbytes) for k, _ in case.layers), "page summaries")
        result = Result(rows, length, self.budget.fraction, case.kv_bytes, self.limit.time_us(case.kv_bytes))
        seq_lens, table = case.on_gpu()
        engine = DecodeEngine(SHAPE)
        engine.plan(seq_lens, table)
        lse = torch.empty(case.q.shape[:2], device=case.q.device)
        rng = np.random.default_rng(rows)
        row_pages = -(-length // SHAPE.page_size)
        even = self._lists(rng, rows, row_pages, np.full((rows, 8), self.budget.pages(row_pages, PINS)))
        small = max(1, int(even.counts[0, 0]) * 2 // (SKEW + 1))
        skewed = np.full((rows, 8), small)
        skewed[:, ::2] = 2 * int(even.counts[0, 0]) - small
        skewed = self._lists(rng, rows, row_pages, np.minimum(skewed, row_pages))

        def time_of(name: str, run: Callable[[int, torch.Tensor], object]) -> None:
            out = torch.empty_like(case.q)
            result.times[name] = graph_time_us(lambda i: run(i, out), variants=len(case.layers),
                                               repeats=self.repeats).median_us  # fmt: skip

        def ours(i: int, out: torch.Tensor, **more: object) -> None:
            engine.run(case.q, *case.layers[i], out=out, lse=lse, **more)

        time_of("dense", ours)
        for name, lists in (("attend", even), ("attend_skewed", skewed)):
            out = torch.full_like(case.q, float("nan"))
            ours(0, out, selected=lists)
            result.errors[name] = self._error(case, out, lists)
            if not result.errors[name] < TOLERANCE:
                raise SystemExit(f"bench_selection: {rows} x {length}: {name} differs by {result.errors[name]:.2g}")
            time_of(name, lambda i, out, lists=lists: ours(i, out, selected=lists))
        masses = torch.empty(rows, 8, row_pages * SHAPE.page_size // 16, 4, device=case.q.device)
        time_of("dense_page_lse", lambda i, out: ours(i, out, page_lse=masses))

        for suffix, (method, summary_dtype) in FORMS.items():
            # Each layer has summaries of its own.
            kind = by_name.method(method).SUMMARY
            summaries = [PageSummaries(SHAPE, k, kind=kind, summary_dtype=summary_dtype) for k, _ in case.layers]
            for own, (k, _) in zip(summaries, case.layers):
                own.update(k, seq_lens, table)
            selector = PageSelector(SHAPE, method=method, budget=self.budget, pins=PINS, summary_dtype=summary_dtype)
            selector.plan(seq_lens, table)
            time_of(f"summarize_one_token{suffix}", lambda i, _, summaries=summaries: summaries[i].update(
                case.layers[i][0], seq_lens, table, new_tokens=1))
            time_of(f"select{suffix}", lambda i, _, selector=selector, summaries=summaries: selector.select(
                case.q, summaries[i]))
            time_of(f"everything{suffix}", lambda i, out, selector=selector, summaries=summaries: ours(
                i, out, selected=selector.select(case.q, summaries[i])))
            out = torch.full_like(case.q, float("nan"))
            lists = selector.select(case.q, summaries[0])
            ours(0, out, selected=lists)
            result.errors[f"everything{suffix}"] = self._error(case, out, lists)
            if not suffix:
                result.host_us = self._host_us(engine, selector, case, summaries[0], out, lse)
            del summaries, own, selector  # memory need not hold those of all forms
        if flashinfer and fi.installed():
            self._flashinfer(case, even, result)
        return result

    @staticmethod
    def _lists(rng: np.random.Generator, rows: int, row_pages: int, counts: np.ndarray) -> PageList:
        """Random ascending places, so many for each head, on the GPU; a row's last page is always among them."""
        pages = np.full((*counts.shape, int(counts.max())), -1, np.int32)
        for (row, head), count in np.ndenumerate(counts):
            chosen = rng.choice(row_pages - 1, count - 1, replace=False)
            pages[row, head, :count] = np.append(np.sort(chosen), row_pages - 1)
        return PageList(torch.from_numpy(pages).cuda(), torch.from_numpy(counts.astype(np.int32)).cuda())

    @staticmethod
    def _error(case: StepCase, out: torch.Tensor, lists: PageList) -> float:
        """The largest difference from float64 over some (row, KV head)s, a NaN shows."""
        device = case.q.device
        worst, rng = torch.zeros((), dtype=torch.float64, device=device), np.random.default_rng(0)
        k, v = case.layers[0]
        table = torch.from_numpy(case.block_table).to(device)
        for row, head in zip(rng.integers(0, len(case.seq_lens), CHECKED), rng.integers(0, 8, CHECKED)):
            places = lists.pages[row, head, : int(lists.counts[row, head])].long()
            at = (places[:, None] * 16 + torch.arange(16, device=device)).view(-1)
            live = at < int(case.seq_lens[row])
            ids = table[row, places].long()
            keys, values = (pool[ids, head].reshape(-1, 128)[live].double() for pool in (k, v))
            q = case.q[row, head * 4 : head * 4 + 4].double()
            want = torch.softmax(q @ keys.T / 128**0.5, dim=-1) @ values
            worst = torch.maximum(worst, (out[row, head * 4 : head * 4 + 4].double() - want).abs().max())
        return float(worst)

    @staticmethod
    def _host_us(engine: DecodeEngine, selector: PageSelector, case: StepCase, summaries: PageSummaries,
                 out: torch.Tensor, lse: torch.Tensor, calls: int = 200) -> dict[str, float]:
        """Wall time of the calls themselves, outside graphs, where every selection changes; a graph has none of it."""
        times = {}
        for name in ("dense", "select and run"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                lists = selector.select(case.q, summaries) if name != "dense" else None
                engine.run(case.q, *case.layers[0], out=out, lse=lse, selected=lists)
            times[name] = (time.perf_counter() - start) / calls * 1e6
            torch.cuda.synchronize()
        return times

    def _flashinfer(self, case: StepCase, lists: PageList, result: Result) -> None:
        """Its decode at its best: heads folded into the batch, so that each (row, KV head) is a row with a table of its
        own. The tables are made outside the time, and the plan too; what both take is told beside it."""
        rows = len(case.seq_lens)
        shape = DecodeShape(4, 1, 128, 16)
        q = case.q.view(rows * 8, 4, 128)
        layers = [tuple(pool.view(-1, 1, 16, 128) for pool in layer) for layer in case.layers]
        table = torch.from_numpy(case.block_table).to(q.device)

        def fold() -> tuple[np.ndarray, np.ndarray]:
            ids = table[:, None].expand(-1, 8, -1).gather(2, lists.pages.clamp(min=0).long())
            ids = ids.int() * 8 + torch.arange(8, dtype=torch.int32, device=q.device)[:, None]
            ids = ids.view(rows * 8, -1).cpu().numpy()
            tokens = (lists.counts.view(-1).cpu().numpy() * 16).astype(np.int32)
            return tokens, ids

        want = torch.empty_like(case.q)
        engine = DecodeEngine(SHAPE)
        engine.plan(*case.on_gpu())
        engine.run(case.q, *case.layers[0], out=want, selected=lists)
        for backend in FLASHINFER:
            name = f"flashinfer_{backend}"
            try:
                theirs = fi.FlashInferDecode(shape, "float16", backend)
                theirs.plan_packed(fi.pack_table(*fold(), page_size=16))
                torch.cuda.synchronize()
                start = time.perf_counter()
                theirs.plan_packed(fi.pack_table(*fold(), page_size=16))
                torch.cuda.synchronize()
                result.host_us[f"{name} fold and plan"] = (time.perf_counter() - start) * 1e6
                out = torch.full_like(q, float("nan"))
                theirs.run(q, *layers[0], out=out, return_lse=False)
                worst = float((out.view_as(want) - want).abs().max())
                result.errors[name] = worst
                if not worst < TOLERANCE:
                    result.notes[name] = f"differs by {worst:.2g}"
                    continue
                result.times[name] = graph_time_us(
                    lambda i, theirs=theirs, out=out: theirs.run(q, *layers[i], out=out, return_lse=False),
                    variants=len(layers), repeats=self.repeats).median_us  # fmt: skip
            except Exception as error:  # a backend whose kernels cannot be built here
                result.notes[name] = why_not(error)
