"""Prices of attention options: what each must and must not change, on every route that serves it."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import AttentionOptions, DecodeShape, make_schedule
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.devices.route_options import read_lens
from pkvsim.kv_types import KV_DTYPES, KV_SCALES
from pkvsim.policy.by_name import CalibratedPolicy, FixedPolicy, OraclePolicy, PaperPolicy
from pkvsim.pricing.counters import merge_bytes, useful_kv_bytes
from pkvsim.studies.replay import replay
from pkvsim.traces.paper_families import paper_trace

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
H200 = get_device("h200")
lengths = st.lists(st.integers(0, 60000), min_size=1, max_size=24)


def decide(lens, available=ROUTES, shape=SHAPE, **options):
    return CalibratedPolicy().decide(shape, lens, H200, available=available, options=AttentionOptions(**options))


@settings(max_examples=40, deadline=None)
@given(lens=lengths, more=st.integers(0, 1000))
def test_options_that_ask_for_nothing_change_nothing(lens, more):
    plain = CalibratedPolicy().decide(SHAPE, lens, H200)
    window = max(1, *lens, 0) + more
    for options in ({}, {"window": window}, {"query_tokens": 1}, {"v_head_dim": 128}, {"soft_cap": 30.0}):
        same = decide(lens, **options)
        assert same.prices == {route: plain.prices[route] for route in same.prices}
        assert options.keys() <= {"soft_cap"} or same.prices.keys() == plain.prices.keys()


@settings(max_examples=60, deadline=None)
@given(lens=lengths, equal=st.booleans(), narrow=st.integers(1, 35000), more=st.integers(0, 70000))
def test_a_window_twice_as_wide_costs_no_less(lens, equal, narrow, more):
    """A few tokens more may meet a rule that cuts them better. Rows alike that read at least twice as much cost no less
    on balanced, within 6 % on routes whose splits are chosen by rules of their own."""
    if equal:
        lens = [max(lens)] * len(lens)
    less, all_ = (decide(lens, window=window).layer_us for window in (narrow, 2 * narrow + more))
    for route in ROUTES:
        within = 1.06 if route not in ("balanced", "flashinfer_cuda_core") else 1 + 1e-12 if equal else 1.02
        assert less[route] <= all_[route] * within


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 64), window=st.integers(1, 4096).map(lambda tiles: 32 * tiles), tiles=st.integers(0, 2048))
def test_a_window_costs_what_rows_of_its_length_cost(rows, window, tiles):
    """Where the window begins on a tile; FlashInfer's CUDA cores walk the whole row."""
    lens = [window + 32 * tiles] * rows
    long = decide(lens, window=window)
    short = decide([window] * rows)
    for route, us in long.layer_us.items():
        if route != "flashinfer_cuda_core":
            assert us == short.layer_us[route]
        else:
            assert us == decide(lens).layer_us[route]


@settings(max_examples=30, deadline=None)
@given(lens=lengths, window=st.integers(1, 20000), query_tokens=st.integers(1, 8))
def test_what_is_read_is_what_is_scheduled(lens, window, query_tokens):
    options = AttentionOptions(window=window, query_tokens=query_tokens)
    lens = np.array(lens, np.int32)
    for route in ("split", "workqueue"):
        tile = int(H200.routes[route].tile_tokens)
        splits = CalibratedPolicy().split_counts(route, SHAPE, lens, H200, options=options)
        tasks = make_schedule(route, SHAPE, lens, splits=splits, tile_tokens=tile, window=options.reach).tasks
        tokens = np.minimum(tasks["tile_end"] * tile, lens[tasks["row"]]) - tasks["tile_begin"] * tile
        assert tokens.sum() == SHAPE.num_kv_heads * read_lens(lens, options.reach, tile).sum()
        alike = {length: set(splits[lens == length].tolist()) for length in lens.tolist()}
        assert all(len(counts) == 1 for counts in alike.values()) and splits.min() >= 1


@settings(max_examples=30, deadline=None)
@given(lens=lengths.filter(any), query_tokens=st.integers(2, 8))
def test_query_tokens_are_query_heads(lens, query_tokens):
    wide = DecodeShape(SHAPE.num_q_heads * query_tokens, SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.page_size)
    many, heads = decide(lens, query_tokens=query_tokens), decide(lens, shape=wide)
    assert many.prices == {route: heads.prices[route] for route in many.prices}
    # Of balanced this need not hold, which may cut a larger group into fewer parts.
    assert many.prices["workqueue"] > decide(lens).prices["workqueue"]


@settings(max_examples=30, deadline=None)
@given(lens=lengths.filter(any))
def test_a_smaller_head_of_v_saves_its_bytes(lens):
    wide = DecodeShape(32, 8, 192, 16)
    full, less = (decide(lens, shape=wide, v_head_dim=dim, available=OWN_ROUTES) for dim in (192, 128))
    assert all(less.layer_us[route] < full.layer_us[route] for route in OWN_ROUTES)


@settings(max_examples=30, deadline=None)
@given(lens=lengths.filter(any), kv_dtype=st.sampled_from(KV_DTYPES), page_size=st.sampled_from([1, 16, 64]))
def test_a_cache_of_bytes_is_priced_by_its_bytes(lens, kv_dtype, page_size):
    shape = DecodeShape(32, 8, 128, page_size)
    plain = useful_kv_bytes(shape, np.array(lens))
    kinds = [AttentionOptions(kv_dtype=kv_dtype, kv_scales=kind) for kind in KV_SCALES]
    sizes = [useful_kv_bytes(shape, np.array(lens), options) for options in kinds]
    assert 2 * sizes[0] == plain
    assert sizes[2] == sizes[0] + sum(lens) * 8 * 2 * 4  # a float for K and one for V
    assert sizes[1] == sizes[0] + int(sum(lens) * 8 * 2 * 4 / page_size)
    prices = [decide(lens, shape=shape, available=OWN_ROUTES, kv_dtype=kv_dtype, kv_scales=kind).layer_us
              for kind in KV_SCALES]
    whole = decide(lens, shape=shape, available=OWN_ROUTES).layer_us
    assert prices[0]["balanced"] < prices[2]["balanced"] < whole["balanced"]
    assert prices[0]["balanced"] < prices[1]["balanced"] <= prices[2]["balanced"]
    assert prices[0]["balanced"] >= whole["balanced"] / 2


def test_a_long_step_of_bytes_takes_about_half_the_time():
    lens = [65536] * 32
    ratio = decide(lens, kv_dtype="float8_e4m3fn").layer_us["balanced"] / decide(lens).layer_us["balanced"]
    assert 0.5 <= ratio < 0.52


def test_bytes():
    options = AttentionOptions(window=100, query_tokens=3, v_head_dim=64)
    assert useful_kv_bytes(SHAPE, np.array([50, 5000]), options) == (50 + 102) * 8 * (128 + 64) * 2
    assert merge_bytes(SHAPE, 5, options) == 5 * (4 * 3) * (2 + 64) * 4


@pytest.mark.parametrize(("options", "routes"), [
    ({"window": 99, "soft_cap": 5.0}, {"flashinfer_cuda_core", "flashinfer_tensor_core"}),
    ({"sinks": True}, {"xqa"}), ({"sinks": True, "soft_cap": 5.0}, set()), ({"v_head_dim": 64}, set()),
    ({"query_tokens": 2}, {"flashinfer_tensor_core", "xqa"}), ({"kv_dtype": "float8_e4m3fn"}, set())])  # fmt: skip
def test_routes_that_do_not_serve_an_option_take_no_part(options, routes):
    assert set(decide([5000, 100], **options).prices) == set(OWN_ROUTES) | routes


def test_refusals():
    sinks = AttentionOptions(sinks=True)
    with pytest.raises(ValueError, match="available: expected a route that serves sinks, .*_cuda_core: it does not serve"):
        decide([9], available=("flashinfer_cuda_core",), sinks=True)
    with pytest.raises(ValueError, match="available: expected a route that serves sinks, .*_tensor_core: it does not"):
        FixedPolicy("flashinfer_tensor_core").decide(SHAPE, [9], H200, options=sinks)
    with pytest.raises(ValueError, match="options: expected plain attention with the policy paper, got"):
        PaperPolicy().decide(SHAPE, [9], H200, options=sinks)
    with pytest.raises(ValueError, match="available: expected a route that serves sinks, .*_cuda_core: it does not serve"):
        OraclePolicy().decide(SHAPE, [9], H200, available=("flashinfer_cuda_core",), options=sinks)


def test_replay_counts_what_a_window_leaves():
    trace = paper_trace("uniform", 1, 6, 3, 3)
    plain, windowed = (
        replay(trace, SHAPE, H200, CalibratedPolicy(), options=AttentionOptions(window=window))["engines"]
        for window in (None, 1024)
    )
    assert windowed.keys() == plain.keys()
    for engine, figures in windowed.items():
        assert figures["useful_kv_mib"] == 3 * 1024 * 8 * 512 / 2**20 < plain[engine]["useful_kv_mib"]
    assert windowed["split"]["launches_per_step"] >= 3  # a launch per length of a row, not of a window
    assert windowed["balanced"]["predicted_step_us"] < plain["balanced"]["predicted_step_us"]
