"""Which rank's page holds which part of a row: host bookkeeping of pools that hold rows together, without a GPU."""
from __future__ import annotations

from typing import Any

import numpy as np

from pkvsim.memory.page_allocator import PageAllocator
from pkvsim.schedule.shares import PageShares


class ShardedAllocator:
    """Rows of tokens over the pools of all ranks, each rank's part by a PageAllocator of its own.

    Every process of a group may keep one: the same calls give the same tables. seq_lens [max_batch] int32, of whole
    rows; ranks [num_ranks], whose block tables and lengths are the ranks' own. Every method either succeeds or raises
    ValueError and changes nothing.
    """

    __slots__ = ("shares", "max_seq_len", "seq_lens", "ranks")

    def __init__(self, shares: PageShares, *, num_pages: int, max_batch: int, max_seq_len: int) -> None:
        """num_pages: of each rank's pool."""
        self.shares, self.max_seq_len = shares, max_seq_len
        self.ranks = tuple(
            PageAllocator(num_pages=num_pages, page_size=shares.page_size, max_batch=max_batch,
                          max_seq_len=max(1, int(shares.of_rank(rank).of(np.int64(max_seq_len)))))
            for rank in range(shares.num_ranks))
        self.seq_lens = np.zeros(max_batch, np.int32)

    def allocate(self, row: int | None = None) -> int:
        """Opens an empty row: the given one, or the first that is not in use."""
        row = self.ranks[0].allocate(row)
        for rank in self.ranks[1:]:
            rank.allocate(row)
        return row

    def extend(self, rows: Any, counts: Any) -> np.ndarray:
        """Adds counts[i] tokens to rows[i], taking pages of the ranks that get them; returns the old lengths."""
        rows, counts = np.asarray(rows, np.int64), np.asarray(counts, np.int64)
        steps = self.local_counts(rows, counts)
        page_size = self.shares.page_size
        for number, (rank, local) in enumerate(zip(self.ranks, steps)):
            old = rank.seq_lens[rows].astype(np.int64)
            needed = int((-(-(old + local) // page_size) - -(-old // page_size)).sum())
            if needed > rank.num_free_pages:
                raise ValueError(f"num_pages: rank {number} is out of pages, expected {needed} free, got "
                                 f"{rank.num_free_pages} of {rank.num_pages}")
        for rank, local in zip(self.ranks, steps):
            rank.extend(rows, local)
        old = self.seq_lens[rows].copy()
        self.seq_lens[rows] += counts.astype(np.int32)
        return old

    def local_counts(self, rows: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """How many of counts [n] new tokens of rows [n] each rank gets. Raises ValueError naming the argument."""
        rows, counts = np.asarray(rows, np.int64), np.asarray(counts, np.int64)
        if rows.ndim != 1 or rows.shape != counts.shape:
            raise ValueError(f"rows, counts: expected equal [n], got {list(rows.shape)}, {list(counts.shape)}")
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows: expected distinct rows, got {rows.tolist()}")
        for row in rows.tolist():
            self.ranks[0].pages(row)  # refuses rows that are not in use
        if (counts < 0).any():
            raise ValueError(f"counts: expected >= 0, got {int(counts.min())}")
        old = self.seq_lens[rows].astype(np.int64)
        if (old + counts > self.max_seq_len).any():
            raise ValueError(f"counts: expected rows of at most {self.max_seq_len} tokens, got "
                             f"{int((old + counts).max())}")
        shares = [self.shares.of_rank(rank) for rank in range(self.shares.num_ranks)]
        return [share.of(old + counts) - share.of(old) for share in shares]

    def free(self, row: int) -> None:
        """Closes a row; its pages go back to their pools."""
        for rank in self.ranks:
            rank.free(row)
        self.seq_lens[row] = 0

    def tokens_of(self, rank: int, begin: int, end: int) -> np.ndarray:
        """Which of a row's tokens [begin, end) are the rank's, as offsets from `begin`, int64."""
        offsets = np.arange(end - begin)
        of, _ = self.shares.place((begin + offsets) // self.shares.page_size)
        return offsets[of == rank]
