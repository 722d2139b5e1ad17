"""A case of decode_ref spread over the ranks of a group, each with its part of the table and, on its device, the pool."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from decode_ref import Case

from gpu.inputs.run import Run
from gpu.several import ShardedDecode
from pkvsim.schedule.shares import PageShares


class RankArrays:
    """Each rank's arrays of a step, by rank; outputs are full of NaN, which stale memory cannot imitate."""

    def __init__(self, engine: ShardedDecode, case: Case, *, extra: dict[str, Any] | None = None) -> None:
        self.engine, self.group, self.case = engine, engine.group, case
        self.tables, self.lens, self.q, self.k, self.v, self.out, self.lse, self.extra = ({} for _ in range(8))
        for rank in self.group.ranks:
            where = f"cuda:{self.group.device(rank)}"
            table = local_table(case.block_table.cpu().numpy(), engine.shares, rank)
            self.tables[rank] = torch.from_numpy(table).to(where)
            for name in ("q", "k_pages", "v_pages"):
                getattr(self, name[0])[rank] = getattr(case, name).to(where, copy=True)
            self.lens[rank] = case.seq_lens.to(where, copy=True)
            v_dim = case.v_pages.shape[-1]
            self.out[rank] = torch.full((*case.q.shape[:-1], v_dim), float("nan"), dtype=case.q.dtype, device=where)
            self.lse[rank] = torch.full(case.q.shape[:-1], float("nan"), device=where)
            self.extra[rank] = {name: value.to(where) for name, value in (extra or {}).items()}
        self.synchronize()

    def synchronize(self) -> None:
        for rank in self.group.ranks:
            torch.cuda.synchronize(self.group.device(rank))

    def plan(self, **more: Any) -> None:
        self.engine.plan([self.lens[rank] for rank in self.group.ranks], [self.tables[rank] for rank in self.group.ranks],
                         **more)

    def poison(self) -> None:
        for rank in self.group.ranks:
            self.out[rank].fill_(float("nan"))
            self.lse[rank].fill_(float("nan"))
        self.synchronize()

    def launch(self, rank: int) -> None:
        """One rank's launch, on the current stream."""
        self.engine.engines[rank].run(Run(self.q[rank], self.k[rank], self.v[rank], self.out[rank], self.lse[rank],
                                          **self.extra[rank]))

    def step(self) -> None:
        """A step of all of them, waited for."""
        for rank in self.group.ranks:
            with self.group.use(rank):
                self.launch(rank)
        self.engine.synchronize()

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of all of them; (out, lse) put together on cuda:0."""
        self.step()
        return self.together()

    def together(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What each rank owns; what it does not must be NaN still, and what all own the same bits."""
        first = self.group.ranks[0]
        out, lse = self.out[first].clone(), self.lse[first].clone()
        for rank in self.group.ranks:
            rows, heads = self.engine.owned(rank, len(self.case.seq_lens))
            own = torch.zeros(self.lse[rank].shape, dtype=torch.bool, device=self.lse[rank].device)
            own[rows.start:rows.stop, heads.start:heads.stop] = True
            assert bool(self.lse[rank][~own].isnan().all()) and bool(self.out[rank][~own].isnan().all())
            part = slice(rows.start, rows.stop), slice(heads.start, heads.stop)
            if self.engine.owner == "all" and rank != first:
                assert torch.equal(out.cpu(), self.out[rank].cpu()) and torch.equal(lse.cpu(), self.lse[rank].cpu())
            out[part], lse[part] = self.out[rank][part].to(out.device), self.lse[rank][part].to(lse.device)
        return out, lse


def local_table(table: np.ndarray, shares: PageShares, rank: int) -> np.ndarray:
    """The rank's pages of each row, [batch_size, local pages] int32."""
    of, place = shares.place(np.arange(table.shape[1]))
    local = np.full((len(table), max(1, int((of == rank).sum()))), 0x7FFFFFFF, np.int32)
    local[:, place[of == rank]] = table[:, of == rank]
    return local
