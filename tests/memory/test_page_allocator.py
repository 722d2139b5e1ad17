"""PageAllocator under random use: no page has two owners, none is lost, errors change nothing."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkvsim.memory.page_allocator import PageAllocator, ShardedAllocator
from pkvsim.schedule.shares import PageShares

NUM_PAGES, PAGE_SIZE, MAX_BATCH, MAX_SEQ_LEN = 20, 3, 5, 31


class Machine(RuleBasedStateMachine):
    """Beside a model in lists: the pages of each row, and those that are free, the next one last."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PageAllocator(num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_batch=MAX_BATCH,
                                  max_seq_len=MAX_SEQ_LEN)
        self.lens: dict[int, int] = {}
        self.rows: dict[int, list[int]] = {}
        self.unused = list(range(NUM_PAGES - 1, -1, -1))

    def snapshot(self) -> tuple:
        return self.pool.block_table.tolist(), self.pool.seq_lens.tolist(), self.pool.free_pages

    def attempt(self, possible: bool, action) -> bool:
        before = self.snapshot()
        if possible:
            action()
            return True
        with pytest.raises(ValueError):
            action()
        assert self.snapshot() == before
        return False

    def open(self, opened: list[int], pages: list[int]) -> None:
        assert opened[0] not in self.lens
        self.rows[opened[0]], self.lens[opened[0]] = pages, len(pages) * PAGE_SIZE

    def let_go(self, pages: list[int]) -> list[int]:
        gone = [page for page in pages if all(page not in own for own in self.rows.values())]
        self.unused += gone[::-1]
        return gone

    def drawn(self, data: st.DataObject) -> int:
        """A row in use, seldom any other."""
        rows = sorted(self.lens)
        return data.draw(st.sampled_from(rows * 3 + [-1, MAX_BATCH]) if rows else st.integers(-1, MAX_BATCH))

    @rule(row=st.none() | st.integers(-1, MAX_BATCH))
    def allocate(self, row: int | None) -> None:
        possible = len(self.lens) < MAX_BATCH if row is None else 0 <= row < MAX_BATCH and row not in self.lens
        opened: list[int] = []
        if self.attempt(possible, lambda: opened.append(self.pool.allocate(row))):
            self.open(opened, [])

    @precondition(lambda self: self.lens)
    @rule(data=st.data(), number=st.sampled_from([1, 1, 2, 3, 0]), count=st.integers(0, 12) | st.integers(-1, 35))
    def extend(self, data: st.DataObject, number: int, count: int) -> None:
        rows = [self.drawn(data) for _ in range(number)]
        known = len(set(rows)) == len(rows) and all(row in self.lens for row in rows)
        fits = known and (not rows or count >= 0) and all(self.lens[row] + count <= MAX_SEQ_LEN for row in rows)
        need = sum(-(-(self.lens[r] + count) // PAGE_SIZE) + -self.lens[r] // PAGE_SIZE for r in rows) if fits else 0
        possible = fits and need <= self.pool.num_free_pages
        if self.attempt(possible, lambda: self.pool.extend(np.array(rows, int), np.full(len(rows), count))):
            for row in rows:
                self.lens[row] += count
                while len(self.rows[row]) * PAGE_SIZE < self.lens[row]:
                    self.rows[row].append(self.unused.pop())

    @precondition(lambda self: self.lens)
    @rule(data=st.data(), pages=st.none() | st.integers(-1, 4))
    def fork(self, data: st.DataObject, pages: int | None) -> None:
        source, opened = self.drawn(data), []
        full = self.lens.get(source, 0) // PAGE_SIZE
        possible = source in self.lens and len(self.lens) < MAX_BATCH and (pages is None or 0 <= pages <= full)
        if self.attempt(possible, lambda: opened.append(self.pool.fork(source, pages=pages))):
            self.open(opened, self.rows[source][:full if pages is None else pages])

    @precondition(lambda self: self.lens)
    @rule(data=st.data(), beyond=st.integers(0, 20))
    def evict(self, data: st.DataObject, beyond: int) -> None:
        row, gone = self.drawn(data), []
        own = self.rows.get(row, [])
        kept = [place for place in range(len(own)) if data.draw(st.booleans())] + [len(own)] * (beyond == 0)
        if self.attempt(row in self.rows and beyond > 0, lambda: gone.append(self.pool.evict(row, kept).tolist())):
            room = len(own) * PAGE_SIZE - self.lens[row]
            self.lens[row] = len(kept) * PAGE_SIZE - (room if len(own) - 1 in kept else 0)
            self.rows[row] = [own[place] for place in kept]
            assert gone == [self.let_go([page for place, page in enumerate(own) if place not in kept])]

    @precondition(lambda self: self.lens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = self.drawn(data)
        if self.attempt(row in self.lens, lambda: self.pool.free(row)):
            del self.lens[row]
            self.let_go(self.rows.pop(row))

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        assert self.pool.free_pages == tuple(self.unused), "the freed pages come back first"
        owned = [page for pages in self.rows.values() for page in pages]
        assert sorted({*owned, *self.unused}) == list(range(NUM_PAGES))
        assert self.pool.owners.tolist() == [owned.count(page) for page in range(NUM_PAGES)]
        for row in range(MAX_BATCH):
            pages = self.rows.get(row, [])
            assert self.pool.block_table[row].tolist() == pages + [-1] * (-(-MAX_SEQ_LEN // PAGE_SIZE) - len(pages))
            assert self.pool.seq_lens[row] == self.lens.get(row, 0)
            assert row not in self.rows or self.pool.pages(row).tolist() == pages


TestPageAllocator = Machine.TestCase
TestPageAllocator.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("counts", [[2**63 - 2], [2**64], [2**63], [1.5], [True], ["1"], [None]])
def test_counts_that_are_none_change_nothing(counts) -> None:
    """3 tokens and 2^63 - 2 more are a negative length in 64 bits, and 1.5 more are not 1."""
    shares = PageShares(PAGE_SIZE, (1, 1))
    for pool in (PageAllocator(num_pages=9, page_size=PAGE_SIZE, max_batch=2, max_seq_len=16),
                 ShardedAllocator(shares, num_pages=9, max_batch=2, max_seq_len=16)):
        row = pool.allocate()
        pool.extend([row], [3])
        for call in (lambda pool=pool: pool.extend([row], counts), lambda pool=pool: pool.extend([0.7], [1])):
            with pytest.raises(ValueError, match="counts: expected|rows: expected"):
                call()
        assert pool.seq_lens.tolist() == [3, 0]


@pytest.mark.parametrize("row", [0.0, "0", None, [0]])
def test_rows_that_are_none_are_named(row) -> None:
    pool = PageAllocator(num_pages=9, page_size=PAGE_SIZE, max_batch=2, max_seq_len=16)
    pool.allocate()
    for call in (pool.pages, pool.free, pool.fork, lambda row: pool.fork(0, pages=row or 0.0)):
        with pytest.raises(ValueError, match=r"(row: expected an integer in \[0, \d+\]|pages: expected an integer >= 0), got"):
            call(row)
