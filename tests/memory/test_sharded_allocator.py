"""Rows over the pools of several ranks: every token in one place, and nothing changes where something does not fit."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.memory.page_allocator import ShardedAllocator
from pkvsim.schedule.shares import PageShares, interleaved

steps = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any).map(tuple), st.integers(1, 5), steps)
def test_rows_grow_over_the_ranks(dealt, page_size, ops) -> None:
    cache = ShardedAllocator(PageShares(page_size, dealt), num_pages=30, max_batch=3, max_seq_len=150)
    for _ in range(3):
        cache.allocate()
    lens = np.zeros(3, int)
    for row, count in ops:
        before = [(rank.block_table.copy(), rank.seq_lens.copy(), rank.free_pages) for rank in cache.ranks]
        try:
            old = cache.extend([row], [count])
        except ValueError as error:
            assert str(error).startswith(("num_pages", "counts"))
            for rank, (table, local, free) in zip(cache.ranks, before):
                assert (rank.block_table == table).all() and (rank.seq_lens == local).all() and rank.free_pages == free
        else:
            assert old[0] == lens[row]
            own = [len(cache.tokens_of(r, lens[row], lens[row] + count)) for r in range(len(dealt))]
            assert sum(own) == count
            for r, (rank, (_, local, _)) in enumerate(zip(cache.ranks, before)):
                assert rank.seq_lens[row] == local[row] + own[r]
            lens[row] += count
        assert (cache.seq_lens == lens).all()
        for r, rank in enumerate(cache.ranks):
            assert (rank.seq_lens == cache.shares.local_lens(lens, r)).all()
    for row in range(3):
        cache.free(row)
    assert all(rank.num_free_pages == 30 for rank in cache.ranks) and not cache.seq_lens.any()


def test_rows_that_are_not_there() -> None:
    cache = ShardedAllocator(interleaved(2, 16), num_pages=4, max_batch=2, max_seq_len=64)
    with pytest.raises(ValueError, match="^row"):
        cache.extend([0], [3])
    cache.allocate()
    for rows, counts, name in (([0, 0], [1, 1], "rows"), ([0], [-1], "counts"), ([0], [1, 2], "rows, counts")):
        with pytest.raises(ValueError, match=f"^{name}"):
            cache.extend(rows, counts)
