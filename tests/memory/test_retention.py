"""Who goes first, who is let in and for how long blocks are held, each beside its definition."""
from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.memory.retention import Belady, Lru, TinyLfu, choose_ttl_s

# A block's number and its next use as of then, which changes every time that it is used.
# The last says whether the policy is asked before the next, since it forgets what is gone when it is.
USES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9) | st.just(float("inf")), st.booleans()), max_size=60)


@given(USES)
def test_belady_gives_up_what_is_used_last_of_all(uses):
    next_use: dict[int, float] = {}
    policy, there = Belady(next_use.__getitem__), {}
    for at, (key, then, asks) in enumerate(uses):
        if key in there:
            policy.remove(key)
            del there[key]
        else:
            next_use[key] = there[key] = then
            policy.add(key)
            there[key] = then, -at  # of equal ones the first that was added
        assert len(policy) == len(there)
        if asks:
            assert policy.victim() == max(there, key=there.__getitem__, default=None)


@given(st.lists(st.integers(0, 5), max_size=60))
def test_lru_gives_up_what_was_added_first(uses):
    policy, order = Lru(), []
    for key in uses:
        if key in order:
            policy.remove(key)
            order.remove(key)
        else:
            policy.add(key)
            order.append(key)
        assert policy.victim() == next(iter(order), None) and len(policy) == len(order)


def test_a_frequency_is_the_least_of_four_counts():
    """40 blocks fall together in some row of 256 counters, and none in all four."""
    sketch = TinyLfu(256)
    for key in range(40):
        for _ in range(key + 1):
            sketch.seen(key)
    assert [sketch.frequency(key) for key in range(40)] == list(range(1, 41))
    assert sketch.admits(8, 7) and not sketch.admits(7, 7) and not sketch.admits(7, 8)


def test_old_requests_count_half():
    """After 10 requests for each of 16 counters, and then after half as many more each time."""
    sketch, found = TinyLfu(16), {}
    for request in range(1, 321):
        sketch.seen("block")
        found[request] = sketch.frequency("block")
    assert [found[at] for at in (159, 160, 239, 240, 319, 320)] == [159, 80, 159, 80, 159, 80]


@given(st.lists(st.integers(0, 80), max_size=20), st.integers(1, 50), st.integers(1, 8))
def test_no_other_time_to_live_gains_more(gaps, benefit, cost):
    def gain(ttl):
        return sum((gap <= ttl) * benefit - min(gap, ttl) * cost for gap in gaps)

    ttl = choose_ttl_s(gaps, benefit_s=benefit, cost_s_per_s=cost, longest_s=60)
    assert ttl == 0 or (ttl in gaps and ttl <= 60)
    assert gain(ttl) == max([gain(0), *(gain(gap) for gap in gaps if gap <= 60)])


def test_the_longest_time_to_live_is_one():
    assert choose_ttl_s(np.array([60.0, 60.0]), benefit_s=100, cost_s_per_s=1, longest_s=60) == 60
    assert choose_ttl_s(np.array([60.5, 60.5]), benefit_s=100, cost_s_per_s=1, longest_s=60) == 0
