"""PageAllocator under random use: no page has two owners, none is lost, errors change nothing."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pkvsim.memory.page_allocator import PageAllocator, ShardedAllocator
from pkvsim.schedule.shares import PageShares

NUM_PAGES, PAGE_SIZE, MAX_BATCH, MAX_SEQ_LEN = 20, 3, 5, 31


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PageAllocator(num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_batch=MAX_BATCH,
                                  max_seq_len=MAX_SEQ_LEN)
        self.lens: dict[int, int] = {}

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

    @rule(row=st.none() | st.integers(-1, MAX_BATCH))
    def allocate(self, row: int | None) -> None:
        possible = len(self.lens) < MAX_BATCH if row is None else 0 <= row < MAX_BATCH and row not in self.lens
        opened: list[int] = []
        if self.attempt(possible, lambda: opened.append(self.pool.allocate(row))):
            assert opened[0] not in self.lens
            self.lens[opened[0]] = 0

    @rule(rows=st.lists(st.integers(-1, MAX_BATCH), max_size=4), count=st.integers(-1, 35))
    def extend(self, rows: list[int], count: int) -> None:
        known = len(set(rows)) == len(rows) and all(row in self.lens for row in rows)
        fits = known and (not rows or count >= 0) and all(self.lens[row] + count <= MAX_SEQ_LEN for row in rows)
        need = sum(-(-(self.lens[r] + count) // PAGE_SIZE) + -self.lens[r] // PAGE_SIZE for r in rows) if fits else 0
        possible = fits and need <= self.pool.num_free_pages
        if self.attempt(possible, lambda: self.pool.extend(np.array(rows, int), np.full(len(rows), count))):
            for row in rows:
                self.lens[row] += count

    @rule(row=st.integers(-1, MAX_BATCH))
    def free(self, row: int) -> None:
        owned = self.pool.pages(row).tolist() if row in self.lens else []
        if self.attempt(row in self.lens, lambda: self.pool.free(row)):
            del self.lens[row]
            if owned:
                assert self.pool.free_pages[-1] == owned[0], "the freed pages come back first"

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned = [page for row in self.lens for page in self.pool.pages(row).tolist()]
        assert sorted(owned + list(self.pool.free_pages)) == list(range(NUM_PAGES))
        assert int((self.pool.block_table >= 0).sum()) == len(owned)
        for row in range(MAX_BATCH):
            assert self.pool.seq_lens[row] == self.lens.get(row, 0)


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
        with pytest.raises(ValueError, match="(row|pages): expected an integer, got"):
            call(row)
