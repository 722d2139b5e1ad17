"""Rows that fork, select, evict, grow, end and are opened again, in any order, over whole pages and pages of one head.

    python -m pytest -q tests/gpu/cache/test_gpu_eviction_machine.py
"""
from __future__ import annotations

import functools

from evicting_rows import ROWS, EvictingRows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pkvsim.selection.evictions import METHODS

SEEDS = st.integers(0, 2**32 - 1)
WHICH = st.integers(0, ROWS - 1)


@functools.cache
def pool(per_head: bool) -> EvictingRows:
    """The one of all examples."""
    return EvictingRows(per_head=per_head, layers=2 if per_head else 1)


class WholePages(RuleBasedStateMachine):
    per_head = False

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool(self.per_head)
        self.pool.begin()

    def row(self, which: int) -> int:
        return self.pool.rows[which % len(self.pool.rows)]

    @initialize(counts=st.lists(st.integers(20, 120), min_size=2, max_size=2), seed=SEEDS)
    def two_rows(self, counts: list[int], seed: int) -> None:
        for row, count in enumerate(counts):
            self.pool.open(row)
            self.pool.grow(row, count, seed + row)

    @precondition(lambda self: self.pool.unused)
    @rule(count=st.integers(0, 100), seed=SEEDS)
    def open(self, count: int, seed: int) -> None:
        row = self.pool.unused[0]
        self.pool.open(row)
        self.pool.grow(row, count, seed)

    @precondition(lambda self: self.pool.rows and self.pool.unused)
    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        self.pool.fork(self.row(which), self.pool.unused[0])

    @precondition(lambda self: self.pool.rows)
    @rule(which=WHICH, count=st.sampled_from([1, 1, 1, 17, 40]), seed=SEEDS)
    def grow(self, which: int, count: int, seed: int) -> None:
        self.pool.grow(self.row(which), count, seed)

    @precondition(lambda self: self.pool.rows)
    @rule(which=WHICH, method=st.sampled_from(METHODS), seed=SEEDS)
    def evict(self, which: int, method: str, seed: int) -> None:
        self.pool.evict(self.row(which), method, seed)

    @precondition(lambda self: self.pool.rows)
    @rule(which=WHICH, evicts=st.booleans(), seed=SEEDS)
    def select(self, which: int, evicts: bool, seed: int) -> None:
        self.pool.select(seed, evict=self.row(which) if evicts else None)

    @precondition(lambda self: len(self.pool.rows) > 1)
    @rule(which=WHICH)
    def free(self, which: int) -> None:
        self.pool.free(self.row(which))

    @rule(seed=SEEDS)
    def decode(self, seed: int) -> None:
        self.pool.decode(seed)


class PagesOfOneHead(WholePages):
    per_head = True


TestWholePages, TestPagesOfOneHead = WholePages.TestCase, PagesOfOneHead.TestCase
TestWholePages.settings = TestPagesOfOneHead.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
