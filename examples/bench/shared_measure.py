"""Measures a step whose rows share pages: ours plain, told and found, FlashInfer's decode and cascade."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from bench.measure import TOLERANCE
from bench.shared_cells import SharedCell

from gpu import DecodeEngine, PrefixGroups, find_prefixes
from gpu.engine.prefixes import PrefixFinder
from gpu.kernels.this_gpu import this_gpu
from gpu.kernels.variant import kernel_config, reads_by_warpgroups, shared_limit_bytes
from gpu.measure.pools import BenchPool, CellPages
from gpu.measure.timing import StreamLimit, graph_time_us, l2_bytes
from gpu.routes import flashinfer_decode as fi
from gpu.routes.flashinfer_builds import why_not
from pkvsim.schedule.costs import SharedCosts, default_shared_costs
from pkvsim.schedule.prefixes import SharingRule

OURS = ("plain", "found")  # and what is told its groups
FLASHINFER = ("tensor_core", "cuda_core")
WORKSPACE_BYTES = 256 << 20
CHECKED_ROWS = 9
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # (k_pages, v_pages, out)


@dataclass(slots=True)
class Result:
    """Times in us, None where a route does not run."""

    cell: str
    distinct_bytes: int
    limit_us: float
    times: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # the largest: against float64, all rows against plain
    notes: dict[str, str] = field(default_factory=dict)
    costs: dict[str, dict[str, int]] = field(default_factory=dict)  # SharedCosts of what was told

    def best_other(self) -> float | None:
        """FlashInfer's best and our plain step, whichever is faster."""
        others = (us for name, us in self.times.items() if name != "found" and name not in self.costs)
        found = [us for us in others if us is not None]
        return min(found, default=None)

    def best_flashinfer(self) -> float | None:
        found = [us for name, us in self.times.items() if us is not None and name in (*FLASHINFER, "cascade")]
        return min(found, default=None)


def default_costs(cell: SharedCell) -> SharedCosts:
    """What the engine weighs by default in such a step."""
    capability = this_gpu().compute_capability
    config = kernel_config(cell.shape, "float16", capability)
    columns = cell.shape.group_size
    return default_shared_costs(cell.rows * columns, row_columns=columns, value_dim=cell.head_dim,
                                by_warpgroups=reads_by_warpgroups(config, capability))  # fmt: skip


class SharedBench:
    """The pool, the streaming limit and the options of all cells."""

    def __init__(self, *, pool_gib: float, repeats: int, cascade: bool) -> None:
        self.pool = BenchPool(pool_gib=pool_gib, dtype=torch.float16, seed=20260623)
        self.limit, self.repeats, self.cascade = StreamLimit(self.pool.flat), repeats, cascade

    def lay_out(self, cell: SharedCell, seed: int) -> CellPages:
        return cell.lay_out(self.pool, l2_size=l2_bytes(), seed=seed)

    def measure(self, cell: SharedCell, *, seed: int = 0, only_ours: bool = False,
                costs: Mapping[str, Mapping[str, int]] = MappingProxyType({})) -> Result:  # fmt: skip
        """only_ours: plain and told alone. costs: fields of SharedCosts with which it is told once more, by name."""
        pages = self.lay_out(cell, seed)
        result = Result(cell.name, cell.distinct_bytes(), self.limit.time_us(cell.distinct_bytes()))
        q = torch.randn(cell.rows, cell.num_q_heads, cell.head_dim, device=self.pool.flat.device).half()
        rows, expected = reference_rows(q, cell, pages)
        told = {"told": {}, **costs} if cell.prefix else {}
        weighed = {name: default_costs(cell)._replace(**fields) for name, fields in told.items()}
        result.costs = {name: one._asdict() for name, one in weighed.items()}
        plain = None  # the checked output of that route, which nothing may write again
        timed = torch.empty_like(q)  # of every route, whose calls read other layers than those that are checked
        routes = ["plain", *weighed, *([] if only_ours else ["found"])]
        if not only_ours:
            routes += [*FLASHINFER, *(["cascade"] if self.cascade and cell.prefix else [])] if fi.installed() else []
        for name in routes:
            out = torch.full_like(q, float("nan"))
            try:
                run = self.route(name, cell, pages, q, weighed.get(name))
                run(*pages.layers[0], out)
                torch.cuda.synchronize()
            except Exception as error:  # a backend whose kernels cannot be built here
                if name in OURS or name in weighed:
                    raise
                result.notes[name] = why_not(error)
                continue
            plain = out if plain is None else plain
            apart = (out[rows].double() - expected).abs().max(), (out - plain).abs().max().double()
            worst = float(torch.stack(apart).max())  # Python's max may pass over a NaN
            result.errors[name] = worst
            if not worst < TOLERANCE["float16"]:
                result.notes[name] = f"differs by {worst:.2g}"
                if name in OURS or name in weighed:
                    raise SystemExit(f"bench_shared: {cell.name}: {name} {result.notes[name]}")
                continue
            result.times[name] = graph_time_us(lambda i: run(*pages.layers[i], timed), variants=len(pages.layers),
                                               repeats=self.repeats).median_us  # fmt: skip
        return result

    def route(self, name: str, cell: SharedCell, pages: CellPages, q: torch.Tensor, weighed: SharedCosts | None) -> Run:
        """weighed: of a route that is told its groups."""
        if weighed is not None:
            return self.ours(cell, pages, q, "told", weighed)
        if name in OURS:
            return self.ours(cell, pages, q, {"plain": None, "found": "auto"}[name])
        if name == "cascade":
            return cascade(cell, pages, q)
        engine = fi.FlashInferDecode(cell.shape, "float16", name)
        engine.plan_packed(fi.pack_table(cell.lengths(), pages.block_table, page_size=16))
        return lambda k_pages, v_pages, out: engine.run(q, k_pages, v_pages, out=out, return_lse=False)

    def ours(self, cell: SharedCell, pages: CellPages, q: torch.Tensor, groups: str | None,
             costs: SharedCosts | None = None, read_stages: int | None = None) -> Run:
        """groups: None, "auto" or "told"."""
        engine = DecodeEngine(cell.shape, shared_costs=costs, read_stages=read_stages)
        lens, table = (torch.from_numpy(array).cuda() for array in (cell.lengths(), pages.block_table))
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
        if groups == "told":
            prefixes = np.full(cell.groups, cell.prefix // 16, np.int32)
            groups = PrefixGroups(*(torch.from_numpy(a).cuda() for a in (cell.group_of_row(), prefixes)))
        engine.plan(lens, table, groups=groups)
        return lambda k_pages, v_pages, out: engine.run(q, k_pages, v_pages, out=out, lse=lse)

    def find_us(self, *cells: SharedCell) -> float:
        """One launch that finds the groups, of tables at rest: warm in L2, as a step's layers leave them. Several cells
        of as many rows take turns, so that each launch finds other groups than the one before it."""
        steps = [[torch.from_numpy(array).cuda() for array in (self.lay_out(cell, 0).block_table, cell.lengths())]
                 for cell in cells]  # fmt: skip
        limit = shared_limit_bytes(this_gpu().compute_capability)
        finder = PrefixFinder(16, 1, SharingRule(), shared_limit_bytes=limit)
        return graph_time_us(lambda i: find_prefixes(*steps[i % len(steps)], page_size=16, finder=finder), variants=20,
                             repeats=self.repeats).median_us  # fmt: skip


def cascade(cell: SharedCell, pages: CellPages, q: torch.Tensor) -> Run:
    """FlashInfer's MultiLevelCascadeAttentionWrapper of two levels."""
    import flashinfer

    each, prefix_pages = cell.rows // cell.groups, cell.prefix // 16
    own = np.ascontiguousarray(pages.block_table[:, prefix_pages:])

    def on_gpu(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int32)).cuda()

    groups, rows = np.arange(cell.groups + 1), np.arange(cell.rows + 1)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "HND")
    wrapper.plan([on_gpu(groups * each), on_gpu(rows)], [on_gpu(groups * prefix_pages), on_gpu(rows * own.shape[1])],
                 [on_gpu(pages.block_table[::each, :prefix_pages].ravel()), on_gpu(own.ravel())],
                 [on_gpu([16] * cell.groups), on_gpu([(cell.own - 1) % 16 + 1] * cell.rows)],
                 cell.num_q_heads, cell.num_kv_heads, cell.head_dim, 16, q_data_type=torch.float16)  # fmt: skip
    return lambda k_pages, v_pages, out: out.copy_(wrapper.run(q, (k_pages, v_pages)))


def reference_rows(q: torch.Tensor, cell: SharedCell, pages: CellPages) -> tuple[list[int], torch.Tensor]:
    """float64 attention of some rows: (rows, [rows, num_q_heads, head_dim])."""
    rows = sorted({int(row) for row in np.linspace(0, cell.rows - 1, CHECKED_ROWS)})
    outs = []
    for row in rows:
        ids = torch.from_numpy(pages.block_table[row].astype(np.int64)).to(q.device)
        k, v = (pool[ids].transpose(0, 1).reshape(cell.num_kv_heads, -1, cell.head_dim)[:, : cell.prefix + cell.own]
                .double() for pool in pages.layers[0])  # [num_kv_heads, tokens, head_dim]
        query = q[row].double().view(cell.num_kv_heads, -1, cell.head_dim)
        weights = torch.softmax(query @ k.transpose(1, 2) / cell.head_dim**0.5, dim=-1)
        outs.append((weights @ v).reshape(-1, cell.head_dim))
    return rows, torch.stack(outs)
