"""Shares of devices: within a block of their bandwidth, within their room, the same every time."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.memory.placement import Shares, in_order_counts, place, share_counts, spread

DEVICES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(0, 400)), min_size=1, max_size=6)


@given(st.integers(0, 500), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_without_bounds_each_is_within_a_block_of_its_share(num_blocks, weights):
    counts = share_counts(num_blocks, weights, [num_blocks] * len(weights))
    assert counts.sum() == num_blocks
    short = num_blocks * np.array(weights) / sum(weights) - counts
    assert (np.abs(short) < 1 + 1e-6).all()
    assert short.max() - short.min() < 1 + 1e-6  # whoever was rounded up had no smaller a remainder


@given(st.integers(0, 500), DEVICES, st.data())
def test_rooms_are_kept_and_all_is_placed_that_fits(num_blocks, devices, data):
    weights, room = map(list, zip(*devices))
    if data.draw(st.booleans()):
        weights[0] = 0.0
    counts = share_counts(num_blocks, weights, room)
    fits = sum(r for w, r in zip(weights, room) if w)
    assert (counts >= 0).all() and (counts <= room).all() and counts.sum() == min(num_blocks, fits)
    # Whoever has room left got no less than a block below its share.
    open_ = [i for i in range(len(room)) if weights[i] and counts[i] < room[i]]
    share = num_blocks * np.array(weights) / max(sum(weights), 1e-300)
    assert all(counts[i] > share[i] - 1 - 1e-6 for i in open_)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_every_leading_part_is_spread(counts):
    devices = spread(counts)
    assert np.bincount(devices, minlength=len(counts)).tolist() == counts
    for k in range(len(devices) + 1):
        part = np.bincount(devices[:k], minlength=len(counts))
        assert (np.abs(part - k * np.array(counts) / max(1, sum(counts))) <= max(1, (len(counts) - 1) / 2) + 1e-9).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), DEVICES)
def test_a_prefix_that_grows_stays_within_a_block_of_its_shares(steps, devices):
    weights = np.array([w for w, _ in devices])
    room = np.full(len(weights), 10**6)
    held = np.zeros(len(weights), np.int64)
    for step in steps:
        new = place(step, weights, room - held, already=held)
        assert len(new) == step
        held += np.bincount(new, minlength=len(weights))
    # The largest remainder of the whole may take back a block that an earlier one gave (Alabama), which stays.
    assert (np.abs(held - held.sum() * weights / weights.sum()) < 2 + 1e-6).all()


def test_other_placements():
    assert place(5, [9, 1], [9, 9], placement="equal").tolist() == [0, 1, 0, 1, 0]
    assert place(5, [1, 9], [3, 9], placement="in_order").tolist() == [0, 0, 0, 1, 1]
    assert place(5, [1, 9], [3, 1], placement="in_order").tolist() == [0, 0, 0, 1]
    assert in_order_counts(0, [3]).tolist() == [0]
    assert len(place(4, [0, 0], [9, 9])) == 0


def test_weights_follow_what_is_measured_once_it_is_off():
    shares = Shares([10e9, 5e9], drift=0.2, smoothing=0.5)
    assert not shares.observe(0, 10**9, 0.105) and shares.replans == 0
    assert shares.observe(0, 10**9, 0.5) and shares.weights[0] < 8e9
    shares.lose(1)
    assert shares.weights[1] == 0 and not shares.observe(1, 10**9, 0.01) and shares.weights[1] == 0
    with pytest.raises(ValueError, match="drift"):
        Shares([1.0], drift=0)


@pytest.mark.parametrize(("gb_s", "replans"), [(7.5, 0), (7.4, 1), (12.5, 0), (12.6, 1)])
def test_drift_is_a_share_of_the_weight(gb_s, replans):
    shares = Shares([10e9, 4e9, 2e9], drift=0.25, smoothing=1.0)
    shares.lose(2)
    assert shares.observe(0, int(gb_s * 1e9), 1.0) == bool(replans) and shares.replans == 1 + replans
    assert shares.weights.tolist() == [gb_s * 1e9 if replans else 10e9, 4e9, 0.0]
