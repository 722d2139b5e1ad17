"""Batches whose rows share leading pages, for the property-based tests."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from strategies import POISON_PAGE

from pkvsim import DecodeShape
from pkvsim.schedule.costs import BalancedCosts, SharedCosts
from pkvsim.schedule.groups import PrefixGroups


@dataclass(frozen=True)
class SharedBatch:
    """What make_schedule takes for a step with groups; rows may be too short for theirs."""

    shape: DecodeShape
    lens: list[int]
    groups: PrefixGroups
    query_tokens: int
    tile_tokens: int
    shared_costs: SharedCosts

    @property
    def columns(self) -> int:
        return self.shape.group_size * self.query_tokens

    def options(self) -> dict:
        return {"groups": self.groups, "query_tokens": self.query_tokens, "tile_tokens": self.tile_tokens,
                "shared_costs": self.shared_costs}  # fmt: skip


@st.composite
def shared_batches(draw: st.DrawFn, max_rows: int = 9, max_pages: int = 12, tiles=(16,)) -> SharedBatch:
    kv_heads = draw(st.integers(1, 3))
    shape = DecodeShape(kv_heads * draw(st.integers(1, 4)), kv_heads, 4, draw(st.sampled_from([1, 3, 16, 32])))
    query_tokens = draw(st.sampled_from([1, 1, 1, 3]))
    num_groups = draw(st.sampled_from([1, 1, 2, 3]))
    tokens = st.one_of(st.integers(0, 16 * max_pages), st.integers(1, max_pages).map(lambda tiles: 16 * tiles))
    pages = [draw(tokens) // shape.page_size for _ in range(num_groups)]
    group_of_row = draw(st.lists(st.sampled_from([-1, *range(num_groups), 0, 0]), min_size=2, max_size=max_rows))
    lens = []
    for group in group_of_row:
        prefix = pages[group] * shape.page_size if group >= 0 else 0
        own = st.sampled_from([0, 0, 1, 2, 3, 16, 17, 40])
        long = own.map(lambda more, base=prefix + query_tokens - 1: base + more)
        length = draw(st.one_of(long, long, long, st.integers(0, 2 * prefix + 20)))
        lens.append(length if length >= query_tokens else 0)
    columns = shape.group_size * query_tokens
    costs = draw(st.builds(SharedCosts, st.integers(2 * columns, 6 * columns), st.integers(0, 120), st.integers(1, 20),
                           st.integers(0, 9), st.sampled_from([0, 0, 1, 3, 8, 60, 256])))  # fmt: skip
    groups = PrefixGroups(group_of_row, pages)
    return SharedBatch(shape, lens, groups, query_tokens, draw(st.sampled_from(tiles)), costs)


balanced_costs = st.builds(
    BalancedCosts, st.integers(0, 9), st.integers(1, 20), st.integers(0, 9), st.sampled_from([0, 80])
)


def share_tables(batch: SharedBatch, seed: int) -> tuple[np.ndarray, int]:
    """(block_table [batch_size, max_pages] int32, pages of the pool): rows that are long enough for their group's
    prefix have its pages, the first row's; spare entries are poisoned."""
    counts = -(-np.array(batch.lens) // batch.shape.page_size)
    num_pages = int(counts.sum()) + 2
    ids = np.random.default_rng(seed).permutation(num_pages)
    table = np.full((len(counts), int(counts.max(initial=0)) + 1), POISON_PAGE, np.int32)
    first, at = {}, 0
    for row, count in enumerate(counts):
        table[row, :count] = ids[at : at + count]
        at += count
        group = int(batch.groups.group_of_row[row])
        prefix = int(batch.groups.prefix_pages[group]) if group >= 0 else 0
        if 0 < prefix * batch.shape.page_size <= batch.lens[row]:
            source = first.setdefault(group, row)
            table[row, :prefix] = table[source, :prefix]
    return table, num_pages
