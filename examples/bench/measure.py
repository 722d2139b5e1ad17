"""Measures one cell: checks every engine's result, then times it cold, in a graph and by wall clock."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from bench.cells import Cell

from gpu import DecodeEngine
from gpu.measure.cases import StepCase, difference, lay_out
from gpu.measure.pools import BenchPool
from gpu.measure.timing import StreamLimit, capture, shared_stream, wall_time_us
from gpu.routes import flashinfer_decode as fi
from gpu.routes.flashinfer_builds import why_not
from pkvsim import DecodeShape

OUR_ROUTES = ("balanced", "workqueue", "split")
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
CHECKED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table; times of a route that was not timed are None and `note` says why."""

    case: str
    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    ragged: bool
    kv_bytes: int
    route: str
    limit_us: float
    kernel_us: float | None = None
    spread: float | None = None
    layers: int = 0
    max_abs_error: float | None = None  # against float32 on sampled rows
    max_abs_difference: float | None = None  # against the cell's first route
    wall_eager_us: float | None = None
    wall_graph_us: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """A planned engine: run one layer, or plan and run one layer."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # k_pages, v_pages, out
    step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    capturable_plan: bool


class CellBench:
    """Everything that outlives a cell: the pool, the streaming limit, the options."""

    __slots__ = ("pool", "limit", "dtype", "head_dim", "page_size", "repeats", "wall_repeats", "check", "min_layers",
                 "_unavailable")

    def __init__(self, *, pool: BenchPool, dtype: str, head_dim: int, page_size: int, repeats: int, wall_repeats: int,
                 check: bool, min_layers: int) -> None:
        self.pool = pool
        self.limit = StreamLimit(pool.flat)
        self.dtype = dtype
        self.head_dim = head_dim
        self.page_size = page_size
        self.repeats = repeats
        self.wall_repeats = wall_repeats
        self.check = check
        self.min_layers = min_layers
        self._unavailable: dict[tuple[str, int], str] = {}  # (route, group size) -> why it cannot run here

    def measure(self, cell: Cell, routes: list[str], *, seed: int) -> list[Result]:
        shape = DecodeShape(num_q_heads=cell.num_q_heads, num_kv_heads=cell.num_kv_heads, head_dim=self.head_dim,
                            page_size=self.page_size)
        case = lay_out(self.pool, shape, cell.lengths(), seed=seed, min_layers=self.min_layers)
        limit_us = self.limit.time_us(case.kv_bytes)
        reference = reference_rows(case) if self.check else None
        results: list[Result] = []
        first: torch.Tensor | None = None
        for name in routes:
            row = {"case": cell.case, "batch_size": cell.batch_size, "num_q_heads": cell.num_q_heads,
                   "num_kv_heads": cell.num_kv_heads, "ragged": cell.ragged, "kv_bytes": case.kv_bytes, "route": name,
                   "limit_us": limit_us, "layers": len(case.layers)}
            if (name, shape.group_size) in self._unavailable:
                results.append(Result(**row, note=self._unavailable[name, shape.group_size]))
                continue
            try:
                route = self.build(name, case)
                out = case.result(route.run)
            except Exception as error:  # a backend whose kernels cannot be built here: named in the table
                if name in OUR_ROUTES:
                    raise
                note = why_not(error)
                self._unavailable[name, shape.group_size] = note
                results.append(Result(**row, note=note))
                continue
            error, apart, note = None, None, ""
            if self.check:
                rows, expected = reference
                error = difference(out[rows], expected)
                first = out if first is None else first
                apart = difference(out, first)
                worst = float(np.max((error, apart)))  # Python's max may pass over a NaN
                if not worst < TOLERANCE[self.dtype]:
                    note = f"differs by {worst:.2g}"
                    if name in OUR_ROUTES:
                        raise SystemExit(f"bench_decode: {cell.case} batch {cell.batch_size}: {name} {note}")
            row |= {"max_abs_error": error, "max_abs_difference": apart, "note": note}
            results.append(Result(**row) if note else Result(**row, **self.time(route, case)))
        return results

    def build(self, name: str, case: StepCase) -> Route:
        """Plans the engine on the cell's lengths, which stay on the device for ours."""
        q = case.q
        if name in OUR_ROUTES:
            engine = DecodeEngine(case.shape, dtype=self.dtype, schedule=name)
            seq_lens, table = case.on_gpu()
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
            fresh = seq_lens.clone()
            engine.plan(seq_lens, table)

            def run(k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
                engine.run(q, k_pages, v_pages, out=out, lse=lse)

            def step(k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
                seq_lens.copy_(fresh)
                engine.plan(seq_lens, table)
                engine.run(q, k_pages, v_pages, out=out, lse=lse)

            return Route(name=name, run=run, step=step, capturable_plan=name == "balanced")
        engine = fi.FlashInferDecode(case.shape, self.dtype, name)
        packed = fi.pack_table(case.seq_lens, case.block_table, page_size=self.page_size)
        engine.plan_packed(packed)

        def run(k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
            engine.run(q, k_pages, v_pages, out=out, return_lse=False)

        def step(k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
            engine.plan_packed(packed)
            engine.run(q, k_pages, v_pages, out=out, return_lse=False)

        return Route(name=name, run=run, step=step, capturable_plan=False)

    def time(self, route: Route, case: StepCase) -> dict[str, float | None]:
        out, layer = torch.empty_like(case.q), case.layers[0]
        kernel = case.time(route.run, repeats=self.repeats)
        times = {"kernel_us": kernel.median_us, "spread": kernel.spread, "wall_eager_us": None, "wall_graph_us": None}
        if self.wall_repeats:
            with shared_stream():
                times["wall_eager_us"] = wall_time_us(lambda: route.step(*layer, out), self.wall_repeats,
                                                      before=self.limit.flush)
                if route.capturable_plan:
                    graph = capture(lambda: route.step(*layer, out))
                    times["wall_graph_us"] = wall_time_us(graph.replay, self.wall_repeats, before=self.limit.flush)
        return times


def reference_rows(case: StepCase) -> tuple[list[int], torch.Tensor]:
    """Float32 attention of a few rows (longest, shortest, first, last): (rows, [rows, Hq, d])."""
    seq_lens, page_size = case.seq_lens, case.shape.page_size
    order = np.argsort(seq_lens, kind="stable")
    rows = sorted({int(order[0]), int(order[-1]), 0, len(seq_lens) - 1})[:CHECKED_ROWS]
    k_pages, v_pages = case.layers[0]
    num_kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    outs = []
    for row in rows:
        length = int(seq_lens[row])
        ids = torch.from_numpy(case.block_table[row, :-(-length // page_size)].astype(np.int64)).cuda()
        query = case.q[row].float().view(num_kv_heads, -1, head_dim)  # [Hkv, G, d]
        k, v = (pool[ids].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length].float()
                for pool in (k_pages, v_pages))  # [Hkv, length, d]
        weights = torch.softmax(query @ k.transpose(1, 2) / head_dim**0.5, dim=-1)
        outs.append((weights @ v).reshape(-1, head_dim))
    return rows, torch.stack(outs)
