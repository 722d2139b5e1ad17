"""The closed form: what must hold for any constants, and the ways of cutting rows by hand."""
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prices import layer_prices

from pkvsim import DecodeShape
from pkvsim.devices.derive import derive_routes, device_routes
from pkvsim.devices.device import DEVICES, get_device
from pkvsim.devices.route_model import CONSTANTS, NUM_CONSTANTS, OWN_ROUTES, ROUTES, RouteModel, constants_matrix
from pkvsim.pricing.constants import MERGE, PLAN, merge_us, read_speeds
from pkvsim.pricing.cuts import chunk_tokens, row_splits, sorted_lengths

H200 = get_device("h200")
CONSTANTS_H200 = constants_matrix(H200.routes)
BY_TURNS = ("split", "workqueue")  # whose merging CTAs have a warp a column
lengths = st.lists(st.integers(0, 60000), min_size=1, max_size=40)


def price(lens, constants=CONSTANTS_H200, *, heads=8, group=4, num_sms=132, dtype=np.int32):
    return layer_prices(np.array(lens, dtype), DecodeShape(heads * group, heads, 128, 16), constants, num_sms)


def test_columns_are_the_fields():
    row = H200.routes["balanced"].to_row()
    assert len(row) == NUM_CONSTANTS and row[PLAN] == H200.routes["balanced"].plan_us
    assert CONSTANTS[PLAN - 1] == "plan_us" and CONSTANTS[MERGE - 1] == "merge_us"


@settings(max_examples=100, deadline=None)
@given(lens=lengths, seed=st.integers(0, 99))
def test_the_order_of_rows_and_empty_ones_do_not_matter(lens, seed):
    shuffled = np.random.default_rng(seed).permutation([*lens, 0, 0])
    for one, other in zip(price(lens), price(shuffled, dtype=np.int64)):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=100, deadline=None)
@given(lens=lengths)
def test_never_faster_than_the_bandwidth(lens):
    prices, splits = price(lens)
    megabytes = sum(lens) * 8 * 512 / 1e6
    for route, us in zip(ROUTES, prices):
        model = H200.routes[route]
        assert us >= model.fixed_us and us >= megabytes * 1e3 / model.bandwidth_gb_s * (1 - 1e-9)
    assert (splits >= 1).all()


def test_missing_routes_cost_infinity():
    prices, splits = price([4096], constants_matrix(H200.routes, OWN_ROUTES))
    gone = [route not in OWN_ROUTES for route in ROUTES]
    assert np.isinf(prices).tolist() == gone and (splits == 0).tolist() == gone


@settings(deadline=None)
@given(lens=st.lists(st.integers(0, 2**20), max_size=300))
def test_sorted_lengths(lens):
    assert sorted_lengths(np.array(lens, np.int64)).tolist() == sorted((n for n in lens if n), reverse=True)


@settings(deadline=None)
@given(lens=st.lists(st.integers(1, 100000), min_size=1, max_size=60), most=st.integers(1, 64))
def test_chunks_fit_the_slots_and_no_smaller_would(lens, most):
    ordered = np.array(sorted(lens, reverse=True))
    chunk = chunk_tokens(ordered, most, 16, 128.0)
    if len(lens) >= most:
        assert chunk >= ordered[0]
        return
    assert sum(-(-n // chunk) for n in lens) <= most
    smaller = chunk - 16
    assert smaller < 128 or sum(-(-n // smaller) for n in lens) > most


def test_row_splits():
    def counts(route, lens, longest_splits, num_sms=132):
        out = np.empty(len(lens), np.int64)
        constants = H200.routes[route].to_row()
        row_splits(np.array(lens, np.int32), np.array(lens, np.int32), 8, num_sms, constants, longest_splits, out)
        return out.tolist()

    assert counts("workqueue", [8000, 4000, 1000, 1, 0], 8) == [8, 4, 1, 1, 1]
    assert counts("xqa", [8000, 4000], 5) == [5, 5]
    assert counts("split", [8192, 8192, 4096, 0], 8) == [8, 8, 16, 1]  # 132 slots over 16 and over 8 heads


def test_bigger_groups_cost_arithmetic_on_cuda_cores_only():
    one, sixteen = price([32768] * 8, group=1)[0], price([32768] * 8, group=16)[0]
    cuda, tensor = ROUTES.index("flashinfer_cuda_core"), ROUTES.index("flashinfer_tensor_core")
    assert sixteen[cuda] > 3 * one[cuda] and sixteen[tensor] < 1.1 * one[tensor]


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_routes(name):
    device = get_device(name)
    routes = device_routes(device)
    assert set(OWN_ROUTES) <= set(routes) <= set(ROUTES)
    assert ("xqa" in routes) == (device.compute_capability >= (9, 0))
    for entry in derive_routes(device).values():
        assert entry.status == "estimated" and "h200" in entry.source
        assert entry.model.cta_read_gb_s <= entry.model.bandwidth_gb_s <= device.peak_gb_s
    for route, entry in device.calibration.items():
        assert routes[route] is entry.model


def test_bad_models():
    good = {"rule": "whole", "bandwidth_gb_s": 1.0, "cta_read_gb_s": 1.0, "fixed_us": 0.0}
    assert RouteModel(**good)
    nan, infinity = float("nan"), float("inf")
    for name, value in [("bandwidth_gb_s", 0), ("fixed_us", -1), ("task_us", nan), ("cta_read_gb_s", infinity)]:
        with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
            RouteModel(**good | {name: value})
    with pytest.raises(ValueError, match="rule: expected one of whole, chunk"):
        RouteModel(**good | {"rule": "greedy"})


@settings(max_examples=60, deadline=None)
@given(
    kv_mb=st.floats(0.01, 400), l2_gb_s=st.sampled_from([math.inf, 9000.0, 1000.0]),
    heads_gb_s=st.sampled_from([math.inf, 50.0]), cta_gb_s=st.sampled_from([20.0, 1e6]),
)  # fmt: skip
def test_what_l2_holds_is_read_from_there(kv_mb, l2_gb_s, heads_gb_s, cta_gb_s):
    """All of up to 100 MB, nothing of 200 and more, whose time adds up in between; never faster than the arithmetic."""
    model = replace(
        H200.routes["xqa"], l2_mb=100.0, l2_gb_s=l2_gb_s, sm_heads_gb_s=16 * heads_gb_s, cta_read_gb_s=cta_gb_s
    )
    memory = model.bandwidth_gb_s
    found = kv_mb * min(1.0, max(0.0, 200 - kv_mb) / 100)
    seconds = (kv_mb - found) / memory + found / max(memory, l2_gb_s)
    together = min(kv_mb / seconds if seconds else math.inf, 132 * heads_gb_s)
    alone, shared = read_speeds(model.to_row(), kv_mb * 1e6, 4, 2.0, 132)
    assert shared == pytest.approx(1e3 * together)
    assert alone == pytest.approx(1e3 * min(cta_gb_s, heads_gb_s, together))


@settings(max_examples=50, deadline=None)
@given(splits=st.integers(2, 64), group=st.integers(1, 64), rows=st.integers(1, 64), route=st.sampled_from(BY_TURNS))
def test_a_merge_takes_a_turn_for_as_many_columns_as_there_are_warps(splits, group, rows, route):
    """A group of up to 8 heads merges in the time of one, but for its bytes; each 8 more take as much again."""
    row, state = H200.routes[route].to_row(), group * 130 * 4.0
    moved = 2 * rows * splits * state / (H200.routes[route].bandwidth_gb_s * 1e3)
    one = merge_us(row, 1, 0.0, splits, rows * splits) - row[MERGE]
    assert merge_us(row, group, state, splits, rows * splits) - row[MERGE] - moved == pytest.approx(one * -(-group // 8))


def test_a_small_sm_merges_fewer_columns_at_a_time():
    routes = derive_routes(get_device("rtx3060"))
    assert all(entry.model.merge_columns == (4.0 if name in BY_TURNS else np.inf) for name, entry in routes.items())
    assert derive_routes(H200)["split"].model.merge_columns == 8.0
