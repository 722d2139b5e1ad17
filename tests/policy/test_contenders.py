"""What the serving loop leaves unpriced is never the cheapest: the same choice, and the same best, as by all prices."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import DecodeShape
from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES
from pkvsim.policy.by_name import policy_routes
from pkvsim.policy.choose import cheapest, choose, make_routing, new_prices, price_contenders
from pkvsim.pricing.cuts import sorted_lengths

SPLIT = ROUTES.index("split")
lengths = st.one_of(
    st.lists(st.integers(1, 60_000), min_size=1, max_size=40),
    st.tuples(st.integers(1, 60_000), st.integers(1, 40)).map(lambda drawn: [drawn[0]] * drawn[1]),
)


@pytest.mark.parametrize("name", ["rtx3060", "h200", "l4", "b200"])
@settings(max_examples=60, deadline=None)
@given(
    lens=lengths, heads=st.sampled_from([1, 4, 8, 32]), group=st.sampled_from([1, 4, 8]),
    layers=st.sampled_from([1, 32, 80]), policy=st.sampled_from(["oracle", "calibrated", "balanced", "split"]),
    pinned=st.sampled_from([None, 1, 8]),
)
def test_the_choice_and_the_best_are_those_of_all_prices(name, lens, heads, group, layers, policy, pinned):
    device = get_device(name)
    routing = make_routing(
        DecodeShape(heads * group, heads, 128, 16), device_routes(device), device, allowed=policy_routes(policy),
        pinned={"split": pinned},
    )
    ordered, whole, part = sorted_lengths(np.array(lens, np.int64)), new_prices(), new_prices()
    chosen = choose(ordered, layers, routing, whole)
    price_contenders(ordered, layers, routing, part)
    all_us, part_us = whole.gpu_us + whole.host_us, part.gpu_us + part.host_us
    assert cheapest(routing.allowed, part) == chosen
    assert part_us.min() == all_us.min()
    left = np.isinf(part_us) & np.isfinite(all_us)
    assert not left[np.arange(len(ROUTES)) != SPLIT].any()
    for one, other in zip(part, whole):
        np.testing.assert_array_equal(one[~left], other[~left])


def test_rows_of_many_lengths_leave_the_papers_split_unpriced():
    device = get_device("rtx3060")
    routing = make_routing(DecodeShape(32, 8, 128, 16), device_routes(device), device)
    prices = new_prices()
    price_contenders(np.arange(1100, 1060, -1), 32, routing, prices)
    assert np.isinf(prices.gpu_us[SPLIT]) and prices.splits[SPLIT] == 0
    price_contenders(np.full(40, 1100), 32, routing, prices)
    assert np.isfinite(prices.gpu_us[SPLIT])
