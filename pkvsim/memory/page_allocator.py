"""Which row owns which page, of one pool or of pools that hold rows together: host bookkeeping, without a GPU."""
from __future__ import annotations

from typing import Any

import numpy as np

from pkvsim.schedule.shares import PageShares


class PageAllocator:
    """Rows of tokens over a pool of pages; freed pages are reused last in, first out.

    block_table [max_batch, max_pages] int32, -1 where no page is owned; seq_lens [max_batch] int32.
    Every method either succeeds or raises ValueError and changes nothing.
    """

    __slots__ = ("num_pages", "page_size", "max_seq_len", "block_table", "seq_lens", "_used", "_free")

    def __init__(self, *, num_pages: int, page_size: int, max_batch: int, max_seq_len: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("max_batch", max_batch),
                            ("max_seq_len", max_seq_len)):
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name}: expected an integer in [1, 2^31), got {value!r}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_seq_len = max_seq_len
        self.block_table = np.full((max_batch, -(-max_seq_len // page_size)), -1, dtype=np.int32)
        self.seq_lens = np.zeros(max_batch, dtype=np.int32)
        self._used = np.zeros(max_batch, dtype=bool)
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def free_pages(self) -> tuple[int, ...]:
        return tuple(self._free)

    def pages(self, row: int) -> np.ndarray:
        """Page ids of a row, in token order."""
        self._check_row(row)
        return self.block_table[row, :-(-int(self.seq_lens[row]) // self.page_size)].copy()

    def allocate(self, row: int | None = None) -> int:
        """Opens an empty row: the given one, or the first that is not in use."""
        if row is None:
            unused = np.flatnonzero(~self._used)
            if len(unused) == 0:
                raise ValueError(f"row: expected an unused row, all {len(self._used)} are in use")
            row = int(unused[0])
        elif not 0 <= row < len(self._used):
            raise ValueError(f"row: expected [0, {len(self._used)}), got {row}")
        elif self._used[row]:
            raise ValueError(f"row: expected an unused row, got {row}, which is in use")
        self._used[row] = True
        return row

    def extend(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Adds counts[i] tokens to rows[i], taking pages as needed; returns the old lengths."""
        rows = np.asarray(rows, dtype=np.int64)
        counts = np.asarray(counts, dtype=np.int64)
        if rows.ndim != 1 or rows.shape != counts.shape:
            raise ValueError(f"rows, counts: expected equal [n], got {list(rows.shape)}, {list(counts.shape)}")
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows: expected distinct rows, got {rows.tolist()}")
        for row in rows.tolist():
            self._check_row(row)
        if (counts < 0).any():
            raise ValueError(f"counts: expected >= 0, got {int(counts.min())}")
        old = self.seq_lens[rows].astype(np.int64)
        new = old + counts
        if (new > self.max_seq_len).any():
            raise ValueError(f"counts: expected rows of at most {self.max_seq_len} tokens, got {int(new.max())}")
        first, last = -(-old // self.page_size), -(-new // self.page_size)
        needed = int((last - first).sum())
        if needed > len(self._free):
            raise ValueError(f"num_pages: out of pages, expected {needed} free, got {len(self._free)} "
                             f"of {self.num_pages}")
        for row, begin, end in zip(rows.tolist(), first.tolist(), last.tolist()):
            for column in range(begin, end):
                self.block_table[row, column] = self._free.pop()
        self.seq_lens[rows] = new
        return old

    def free(self, row: int) -> None:
        """Closes a row; its pages go back on the free list."""
        self._check_row(row)
        owned = self.pages(row)
        self._free.extend(owned[::-1].tolist())
        self.block_table[row, :len(owned)] = -1
        self.seq_lens[row] = 0
        self._used[row] = False

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self._used) or not self._used[row]:
            raise ValueError(f"row: expected a row in use, got {row}")


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
