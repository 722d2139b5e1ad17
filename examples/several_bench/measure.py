"""Lays a step out over ranks, checks it against one engine that has all pages, and times the ways of computing it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from several_bench.cells import PAGE_SIZE, SeveralCell, local_tables, whole_table
from several_bench.ranks import Ranks, processes_meet
from several_bench.timing import WayTime

from gpu import DecodeEngine
from gpu.inputs.run import Run
from gpu.measure.timing import l2_bytes, rotation_length
from gpu.several import CollectiveGroup, ShardedDecode
from pkvsim.schedule.shares import PageShares

TOLERANCE = 2e-3
MOST_LAYERS = 64


@dataclass(slots=True)
class Pages:
    """One device's copy of all ranks' pages: a rank's are [rank * each, (rank + 1) * each) of every layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]  # (k_pages, v_pages) of all
    each: int  # pages of a rank
    q: torch.Tensor

    def of(self, rank: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.layers[layer]
        return k[rank * self.each:(rank + 1) * self.each], v[rank * self.each:(rank + 1) * self.each]


@dataclass(slots=True)
class Result:
    """us of a call; `ways` by name, (median, largest) over the replays, of each the slowest rank's."""

    cell: str
    kv_bytes: int
    ranks: int
    layers: int
    ways: dict[str, tuple[float, float]] = field(default_factory=dict)
    by_rank: dict[str, tuple[float, ...]] = field(default_factory=dict)  # by way, the median of each rank that ran
    calls: dict[str, int] = field(default_factory=dict)  # by way, of a graph
    errors: dict[str, float] = field(default_factory=dict)  # the largest, against one engine
    notes: dict[str, str] = field(default_factory=dict)  # by way, what makes its time doubtful

    def add(self, way: str, time: WayTime) -> None:
        self.ways[way], self.by_rank[way] = (time.median_us, time.largest_us), time.by_rank_us
        self.calls[way] = time.calls
        if time.apart:
            self.notes[way] = "the host was late, and the ranks may have started one after the other"


class SeveralBench:
    """A cell at a time, on one group and, where there are processes, on one of collectives beside it."""

    def __init__(self, group: Any, collectives: CollectiveGroup | None, *, repeats: int, num_ctas: int | None) -> None:
        meet = None if hasattr(group, "streams") else processes_meet(group)
        self.ranks, self.repeats, self.num_ctas = Ranks(group, meet), repeats, num_ctas
        self.collectives = None if collectives is None else Ranks(collectives, meet)

    def measure(self, cell: SeveralCell, owners: tuple[str, ...]) -> Result:
        group = self.ranks.group
        shares = cell.shares(group.num_ranks)
        tables = local_tables(cell, shares)
        local_bytes = max(int(shares.local_lens(cell.lengths(), rank).sum()) * cell.kv_bytes() // (
            cell.rows * cell.tokens) for rank in range(group.num_ranks))
        layers = min(MOST_LAYERS, max(2, rotation_length(max(1, local_bytes), l2_size=l2_bytes())))
        pages = {device: lay_out(cell, tables, device, layers)
                 for device in sorted({group.device(rank) for rank in group.ranks})}
        result = Result(cell.name, cell.kv_bytes(), group.num_ranks, layers)
        wanted = self._one(cell, tables, pages, result)
        self._alone(cell, shares, tables, pages, result)
        for owner in owners:
            self._several(self.ranks, f"several, {owner}", cell, shares, tables, pages, result, wanted, owner)
            if group.sharers(group.ranks[0]) > 1:
                self._several(self.ranks, f"several, {owner}, overlapping", cell, shares, tables, pages, result, wanted,
                              owner, overlap=True)
        if self.collectives is not None:
            for owner in owners:
                name = f"{'all-gather' if owner == 'all' else 'all-to-all'}, {owner}"
                self._several(self.collectives, name, cell, shares, tables, pages, result, wanted, owner)
        return result

    def _one(self, cell: SeveralCell, tables: list[np.ndarray], pages: dict[int, Pages], result: Result) -> dict:
        """One engine that has all pages, on the device of each rank; one after the other where ranks share it."""
        group, runs, wanted = self.ranks.group, {}, {}
        for rank in group.ranks:
            device = group.device(rank)
            if device in wanted:
                continue
            with self.ranks.on(rank):
                engine = DecodeEngine(cell.shape)
                engine.plan(*on_device(device, cell.lengths(), whole_table(tables, pages[device].each, cell.shares(
                    group.num_ranks))))
                runs[rank] = plain_run(engine, pages[device], lambda layer, p=pages[device]: p.layers[layer])
                runs[rank](0)
                wanted[device] = runs[rank].out.clone()
        self.ranks.synchronize()
        result.add("one", self.ranks.time_us(runs, layers=result.layers, repeats=self.repeats))
        return wanted

    def _alone(self, cell: SeveralCell, shares: PageShares, tables: list[np.ndarray], pages: dict[int, Pages],
               result: Result) -> None:
        """Each rank's own pages by an engine that knows of no other rank, all at a time."""
        group, runs = self.ranks.group, {}
        for rank in group.ranks:
            with self.ranks.on(rank):
                device, own = group.device(rank), pages[group.device(rank)]
                engine = DecodeEngine(cell.shape, num_ctas=self.num_ctas)
                engine.plan(*on_device(device, shares.local_lens(cell.lengths(), rank), tables[rank]))
                runs[rank] = plain_run(engine, own, lambda layer, p=own, rank=rank: p.of(rank, layer))
        self.ranks.synchronize()
        result.add("alone", self.ranks.time_us(runs, layers=result.layers, repeats=self.repeats))

    def _several(self, ranks: Ranks, name: str, cell: SeveralCell, shares: PageShares, tables: list[np.ndarray],
                 pages: dict[int, Pages], result: Result, wanted: dict, owner: str, *,
                 overlap: bool | None = None) -> None:
        group = ranks.group
        engine = ShardedDecode(cell.shape, group=group, owner=owner, shares=shares, max_batch=cell.rows,
                               num_ctas=self.num_ctas, overlap=overlap)
        lens, local = [], []
        for rank in group.ranks:
            one, table = on_device(group.device(rank), cell.lengths(), tables[rank])
            lens.append(one), local.append(table)
        ranks.synchronize()
        engine.plan(lens, local)
        runs, outs = {}, {}
        for rank in group.ranks:
            own = pages[group.device(rank)]
            out = torch.full_like(own.q, float("nan"))
            lse = torch.full(own.q.shape[:2], float("nan"), device=own.q.device)
            outs[rank] = out

            def run_one(layer: int, rank=rank, own=own, out=out, lse=lse) -> None:
                engine.engines[rank].run(Run(own.q, *own.of(rank, layer), out, lse))

            runs[rank] = run_one
        found = []
        ranks.synchronize()
        for _ in range(2):
            for rank, run in runs.items():
                with ranks.on(rank):
                    run(0)
            engine.synchronize()
            found.append({rank: out.clone() for rank, out in outs.items()})
        worst = 0.0
        for rank in group.ranks:
            rows, heads = engine.owned(rank, cell.rows)
            part = (slice(rows.start, rows.stop), slice(heads.start, heads.stop))
            if not torch.equal(found[0][rank][part], found[1][rank][part]):
                raise SystemExit(f"bench_several: {cell.name}: {name}: two runs differ")
            apart = (found[0][rank][part].float() - wanted[group.device(rank)][part].float()).abs()
            worst = max(worst, float(apart.max()) if apart.numel() else 0.0)
            if apart.isnan().any():
                worst = float("nan")
        (worst,) = ranks.together([worst if worst == worst else 1e9])
        result.errors[name] = worst
        if not worst < TOLERANCE:
            raise SystemExit(f"bench_several: {cell.name}: {name} differs from one engine by {worst:.2g}")
        result.add(name, ranks.time_us(runs, layers=result.layers, repeats=self.repeats))
        engine.synchronize()


class plain_run:  # noqa: N801 - a function with an output that can be looked at
    """Runs a DecodeEngine on a layer's pages."""

    def __init__(self, engine: DecodeEngine, pages: Pages, layer_pages: Callable[[int], tuple]) -> None:
        self.engine, self.q, self.layer_pages = engine, pages.q, layer_pages
        self.out = torch.full_like(pages.q, float("nan"))
        self.lse = torch.empty(pages.q.shape[:2], dtype=torch.float32, device=pages.q.device)

    def __call__(self, layer: int) -> None:
        self.engine.run(self.q, *self.layer_pages(layer), out=self.out, lse=self.lse)


def lay_out(cell: SeveralCell, tables: list[np.ndarray], device: int, layers: int) -> Pages:
    """The same random pages on every device."""
    each, where = max(table.size for table in tables), f"cuda:{device}"
    page = (cell.num_kv_heads, PAGE_SIZE, cell.head_dim)
    random = torch.Generator(where).manual_seed(20260623)
    made = []
    for _ in range(layers):
        pair = []
        for _ in range(2):
            pool = torch.empty(len(tables) * each, *page, dtype=torch.float16, device=where)
            for chunk in pool.view(-1).split(1 << 28):
                chunk.normal_(generator=random)
            pair.append(pool)
        made.append((pair[0], pair[1].mul_(0.5)))
    q = torch.randn(cell.rows, cell.num_q_heads, cell.head_dim, generator=random, device=where).half()
    torch.cuda.synchronize(device)
    return Pages(made, each, q)


def on_device(device: int, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)).to(f"cuda:{device}") for array in arrays]
