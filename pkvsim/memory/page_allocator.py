"""Which row owns which page, of one pool or of pools that hold rows together: host bookkeeping, without a GPU."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pkvsim.schedule.shares import PageShares
from pkvsim.shapes import MAX_TOKENS, check_int


def _integers(name: str, values: Any) -> np.ndarray:
    """int64 [n]. ValueError unless they are integers: 1.5 tokens are not 1."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers of 64 bits, got {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)


class PageAllocator:
    """Rows of tokens over a pool of pages; freed pages are reused last in, first out.

    block_table [max_batch, max_pages] int32, -1 where no page is owned; seq_lens [max_batch] int32; owners [num_pages]
    int32, rows that have each page. A page that several rows have is full, and goes back when the last one lets it go.
    Every method either succeeds or raises ValueError and changes nothing.
    """

    __slots__ = ("num_pages", "page_size", "max_seq_len", "block_table", "seq_lens", "owners", "_used", "_free")

    def __init__(self, *, num_pages: int, page_size: int, max_batch: int, max_seq_len: int) -> None:
        self.num_pages = check_int("num_pages", num_pages, 1, MAX_TOKENS)
        self.page_size = check_int("page_size", page_size, 1, MAX_TOKENS)
        self.max_seq_len = check_int("max_seq_len", max_seq_len, 1, MAX_TOKENS)
        max_batch = check_int("max_batch", max_batch, 1, MAX_TOKENS)
        self.block_table = np.full((max_batch, -(-self.max_seq_len // self.page_size)), -1, dtype=np.int32)
        self.seq_lens = np.zeros(max_batch, dtype=np.int32)
        self.owners = np.zeros(self.num_pages, dtype=np.int32)
        self._used = np.zeros(max_batch, dtype=bool)
        self._free = list(range(self.num_pages - 1, -1, -1))

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
        elif self._used[check_int("row", row, 0, len(self._used) - 1)]:
            raise ValueError(f"row: expected an unused row, got {row}, which is in use")
        self._used[row] = True
        return int(row)

    def extend(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Adds counts[i] tokens to rows[i], taking pages as needed; returns the old lengths."""
        rows, counts = _integers("rows", rows), _integers("counts", counts)
        if rows.ndim != 1 or rows.shape != counts.shape:
            raise ValueError(f"rows, counts: expected equal [n], got {list(rows.shape)}, {list(counts.shape)}")
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows: expected distinct rows, got {rows.tolist()}")
        for row in rows.tolist():
            self._check_row(row)
        if (counts < 0).any():
            raise ValueError(f"counts: expected >= 0, got {int(counts.min())}")
        old = self.seq_lens[rows].astype(np.int64)
        if (counts > self.max_seq_len - old).any():  # a sum might pass 2^63
            raise ValueError(f"counts: expected rows of at most {self.max_seq_len} tokens, got {counts.tolist()} more")
        new = old + counts
        first, last = -(-old // self.page_size), -(-new // self.page_size)
        needed = int((last - first).sum())
        if needed > len(self._free):
            raise ValueError(f"num_pages: out of pages, expected {needed} free, got {len(self._free)} "
                             f"of {self.num_pages}")
        for row, begin, end in zip(rows.tolist(), first.tolist(), last.tolist()):
            for column in range(begin, end):
                page = self._free.pop()
                self.block_table[row, column], self.owners[page] = page, 1
        self.seq_lens[rows] = new
        return old

    def fork(self, source: int, *, pages: int | None = None, row: int | None = None) -> int:
        """Opens a row (as allocate() does) that begins with another's first full pages, which both then have.

        pages: how many of them, by default all.
        """
        self._check_row(source)
        full = int(self.seq_lens[source]) // self.page_size
        pages = full if pages is None else check_int("pages", pages, 0)
        if pages > full:
            raise ValueError(f"pages: expected at most the {full} full pages of row {source}, got {pages}")
        row = self.allocate(row)
        shared = self.block_table[source, :pages]
        self.block_table[row, :pages] = shared
        self.owners[shared] += 1
        self.seq_lens[row] = pages * self.page_size
        return row

    def evict(self, row: int, kept: Any) -> np.ndarray:
        """A row keeps its pages at the places `kept` [n], ascending, and closes up: the rest of its table moves, no
        page does. Returns the pages that went back to the pool, int32: those that no other row has."""
        return self.evict_rows([row], [kept])

    def evict_rows(self, rows: Sequence[int], kept: Sequence[Any]) -> np.ndarray:
        """evict() of several rows, each with places of its own: all of them or, where one cannot be, none."""
        if len(set(rows)) != len(rows) or len(rows) != len(kept):
            raise ValueError(f"rows, kept: expected distinct rows and places of each, got {list(rows)} and {len(kept)}")
        places = [self._check_kept(row, own) for row, own in zip(rows, kept)]
        gone = [self._close_up(row, own) for row, own in zip(rows, places)]
        return np.concatenate([np.zeros(0, np.int32), *gone])

    def _check_kept(self, row: int, kept: Any) -> np.ndarray:
        count, kept = len(self.pages(row)), np.asarray(kept)
        if kept.ndim != 1 or (kept.dtype.kind not in "iu" and kept.size):
            raise ValueError(f"kept: expected integers [n], got {kept.dtype} {list(kept.shape)}")
        kept = kept.astype(np.int64)
        if (np.diff(kept) <= 0).any() or (kept < 0).any() or (kept >= count).any():
            raise ValueError(f"kept: expected ascending places below the {count} pages of row {row}, got "
                             f"{kept.tolist()}")
        return kept

    def _close_up(self, row: int, kept: np.ndarray) -> np.ndarray:
        owned = self.pages(row)
        room = len(owned) * self.page_size - int(self.seq_lens[row])  # what the last page has room for yet
        still = owned[kept]
        self.block_table[row, :len(owned)] = -1
        self.block_table[row, :len(still)] = still
        has_last = len(kept) > 0 and int(kept[-1]) == len(owned) - 1
        self.seq_lens[row] = len(still) * self.page_size - (room if has_last else 0)
        return self._let_go(np.delete(owned, kept))

    def by_head(self, num_kv_heads: int) -> PageAllocator:
        """The same rows over pages of one KV head, whose lists then differ: head h of page p is page p * num_kv_heads +
        h, that of row r is row r * num_kv_heads + h. A pool [num_pages, num_kv_heads, ...] is one of such pages as it
        lies, viewed as [num_pages * num_kv_heads, 1, ...]."""
        heads = np.arange(num_kv_heads)
        found = PageAllocator(num_pages=self.num_pages * num_kv_heads, page_size=self.page_size,
                              max_batch=len(self._used) * num_kv_heads, max_seq_len=self.max_seq_len)
        table = self.block_table[:, None].astype(np.int64)
        table = np.where(table < 0, -1, table * num_kv_heads + heads[:, None])  # [rows, heads, max_pages]
        found.block_table[:] = table.reshape(found.block_table.shape)
        found.seq_lens[:], found._used[:] = (np.repeat(own, num_kv_heads) for own in (self.seq_lens, self._used))
        found.owners[:] = np.repeat(self.owners, num_kv_heads)
        found._free = [page * num_kv_heads + head for page in self._free for head in heads[::-1].tolist()]
        return found

    def free(self, row: int) -> None:
        """Closes a row; its pages go back on the free list."""
        self._check_row(row)
        owned = self.pages(row)
        self.block_table[row, :len(owned)] = -1
        self.seq_lens[row] = 0
        self._used[row] = False
        self._let_go(owned)

    def _let_go(self, pages: np.ndarray) -> np.ndarray:
        """A row has these no more. Those that nobody has go back, such that the first of them is reused first."""
        self.owners[pages] -= 1
        unowned = pages[self.owners[pages] == 0]
        self._free.extend(unowned[::-1].tolist())
        return unowned

    def _check_row(self, row: int) -> None:
        if not self._used[check_int("row", row, 0, len(self._used) - 1)]:
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
        self.shares, self.max_seq_len = shares, check_int("max_seq_len", max_seq_len, 1, MAX_TOKENS)
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
        rows, counts = _integers("rows", rows), _integers("counts", counts)
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
        rows, counts = _integers("rows", rows), _integers("counts", counts)
        if rows.ndim != 1 or rows.shape != counts.shape:
            raise ValueError(f"rows, counts: expected equal [n], got {list(rows.shape)}, {list(counts.shape)}")
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows: expected distinct rows, got {rows.tolist()}")
        for row in rows.tolist():
            self.ranks[0].pages(row)  # refuses rows that are not in use
        if (counts < 0).any():
            raise ValueError(f"counts: expected >= 0, got {int(counts.min())}")
        old = self.seq_lens[rows].astype(np.int64)
        if (counts > self.max_seq_len - old).any():  # a sum might pass 2^63
            raise ValueError(f"counts: expected rows of at most {self.max_seq_len} tokens, got {counts.tolist()} more")
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
