"""The steps that bench_several.py times. Needs no GPU."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim import DecodeShape
from pkvsim.schedule.shares import PageShares, in_proportion, interleaved

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class SeveralCell:
    """Rows of one length, and how their pages are shared."""

    name: str
    rows: int
    tokens: int
    weights: tuple[int, ...] | None = None  # of the ranks' shares; None: alike
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(self.num_q_heads, self.num_kv_heads, self.head_dim, PAGE_SIZE)

    def shares(self, num_ranks: int) -> PageShares:
        """Weights are of the first ranks, the last of them is all others'."""
        if self.weights is None:
            return interleaved(num_ranks, PAGE_SIZE)
        first, rest = self.weights[0], self.weights[1] / (num_ranks - 1)
        return in_proportion((first, *(rest,) * (num_ranks - 1)), PAGE_SIZE, cycle_pages=10 * (num_ranks - 1))

    def lengths(self) -> np.ndarray:
        return np.full(self.rows, self.tokens, np.int32)

    def kv_bytes(self) -> int:
        """Distinct K and V bytes of a step, FP16."""
        return self.rows * self.tokens * self.num_kv_heads * self.head_dim * 4


CELLS = (
    SeveralCell("1 x 128K", 1, 131072),
    SeveralCell("1 x 32K", 1, 32768),
    SeveralCell("1 x 8K", 1, 8192),
    SeveralCell("8 x 8K", 8, 8192),
    SeveralCell("8 x 32K", 8, 32768),
    SeveralCell("64 x 8K", 64, 8192),
    SeveralCell("1 x 128K, 70:30", 1, 131072, (7, 3)),
    SeveralCell("8 x 32K, 70:30", 8, 32768, (7, 3)),
)
LONG = SeveralCell("1 x 1M", 1, 1 << 20)
ONE_GPU = (CELLS[1], CELLS[3])  # what ranks that share a GPU are compared on


def local_tables(cell: SeveralCell, shares: PageShares) -> list[np.ndarray]:
    """Each rank's block table [rows, local pages] int32, of its own pages in random order."""
    row_pages = -(-cell.tokens // PAGE_SIZE)
    rng, tables = np.random.default_rng(20260623), []
    for rank in range(shares.num_ranks):
        count = shares.local_pages(row_pages, rank)
        tables.append(rng.permutation(cell.rows * count).astype(np.int32).reshape(cell.rows, count))
    return tables


def whole_table(tables: list[np.ndarray], each: int, shares: PageShares) -> np.ndarray:
    """The rows' pages on a device that has all ranks', in the rows' order."""
    row_pages = sum(table.shape[1] for table in tables)
    of, place = shares.place(np.arange(row_pages))
    whole = np.empty((len(tables[0]), row_pages), np.int32)
    for rank, table in enumerate(tables):
        whole[:, of == rank] = table[:, place[of == rank]] + rank * each
    return whole
