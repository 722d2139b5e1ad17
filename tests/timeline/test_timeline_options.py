"""Attention options in the timeline and the oracle: what each must and must not change."""
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pkvsim import AttentionOptions, DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.devices.route_options import as_read, read_lens
from pkvsim.policy.by_name import CalibratedPolicy, FixedPolicy, OraclePolicy
from pkvsim.timeline.timeline import makespan_us, route_schedule, simulate

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
H200 = get_device("h200")
routes = st.sampled_from(ROUTES)
lengths = st.lists(st.integers(0, 60000), min_size=1, max_size=24).map(lambda lens: np.array(lens, np.int32))
any_options = st.builds(
    AttentionOptions,
    window=st.one_of(st.none(), st.integers(1, 70000)),
    query_tokens=st.integers(1, 8),
    v_head_dim=st.sampled_from([None, 64, 128]),
)


@settings(max_examples=60, deadline=None)
@given(route=routes, lens=lengths, more=st.integers(0, 1000))
def test_options_that_ask_for_nothing_change_nothing(route, lens, more):
    plain = simulate(H200.routes[route], SHAPE, lens, num_sms=132)
    for asked in ({"window": max(1, int(lens.max())) + more}, {"v_head_dim": 128}, {"soft_cap": 30.0}, {"sinks": True}):
        same = simulate(H200.routes[route], SHAPE, lens, num_sms=132, options=AttentionOptions(**asked))
        assert same.makespan_us == plain.makespan_us
        for name in ("slot", "start_us", "end_us", "bytes"):
            np.testing.assert_array_equal(getattr(same, name), getattr(plain, name))


@settings(max_examples=80, deadline=None)
@given(route=routes, lens=lengths, options=any_options, splits=st.sampled_from([None, 3]))
def test_the_bytes_are_those_of_the_tiles_that_the_window_touches(route, lens, options, splits):
    model = H200.routes[route]
    lane = simulate(model, SHAPE, lens, num_sms=132, splits=splits, options=options)
    tile, width = int(model.tile_tokens), options.kv_token_bytes(SHAPE)
    reads = read_lens(lens, options.reach, tile)
    rows = np.bincount(lane.schedule.tasks["row"], lane.bytes, minlength=len(lens))
    np.testing.assert_allclose(rows, reads * float(SHAPE.num_kv_heads * width))
    if options.reach is not None:
        assert (reads >= np.minimum(lens, options.reach)).all() and (reads < options.reach + tile).all()
        first = lens[lane.schedule.tasks["row"]] - options.reach
        assert (lane.schedule.tasks["tile_begin"] * tile + tile > first).all()
    wanted = route_schedule(model, SHAPE, lens, num_sms=132, splits=splits, options=options)
    np.testing.assert_array_equal(lane.schedule.tasks, wanted.tasks)


@settings(max_examples=40, deadline=None)
@given(route=routes, lens=lengths, query_tokens=st.integers(2, 8))
def test_query_tokens_are_query_heads(route, lens, query_tokens):
    wide = DecodeShape(SHAPE.num_q_heads * query_tokens, SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.page_size)
    many = makespan_us(
        H200.routes[route], SHAPE, lens, num_sms=132, options=AttentionOptions(query_tokens=query_tokens)
    )
    assert many == makespan_us(H200.routes[route], wide, lens, num_sms=132)


@settings(max_examples=40, deadline=None)
@given(lens=lengths.filter(any), route=st.sampled_from(OWN_ROUTES))
def test_a_smaller_head_of_v_saves_its_bytes(lens, route):
    wide, less = DecodeShape(32, 8, 192, 16), AttentionOptions(v_head_dim=128)
    full, saved = (
        simulate(H200.routes[route], wide, lens, num_sms=132, splits=2, options=options)
        for options in (AttentionOptions(), less)
    )
    np.testing.assert_allclose(saved.bytes, full.bytes * (192 + 128) / (2 * 192))
    assert saved.makespan_us < full.makespan_us


@settings(max_examples=40, deadline=None)
@given(lens=lengths, options=any_options, layers=st.integers(1, 64))
# Eight heads of these rows are four tasks more than slots, and too unlike to end together.
@example(lens=np.array([97] * 3 + [99] + [108] * 3 + [124] * 8 + [140, 156], np.int32),
         options=AttentionOptions(window=84), layers=1)  # fmt: skip
def test_the_oracle_takes_the_cheapest_by_the_timeline(lens, options, layers):
    oracle = OraclePolicy().decide(SHAPE, lens, H200, layers=layers, options=options)
    closed = CalibratedPolicy().decide(SHAPE, lens, H200, layers=layers, options=options)
    assert oracle.prices.keys() == closed.prices.keys()
    for route, price in oracle.prices.items():
        assert oracle.prices[oracle.route] <= price
        kernel_us = makespan_us(H200.routes[route], SHAPE, lens, num_sms=132, options=as_read(route, options))
        assert oracle.layer_us[route] == kernel_us
    # The closed form takes rows as if the longest came first: a long one that starts last shows in the timeline alone.
    ordered = np.sort(lens)[::-1].copy()
    oracle = OraclePolicy().decide(SHAPE, ordered, H200, layers=layers, options=options)
    for route in oracle.prices:
        fixed = FixedPolicy(route).decide(SHAPE, ordered, H200, layers=layers, options=options)
        assert oracle.layer_us[route] == pytest.approx(fixed.layer_us[route], rel=0.4)


@settings(max_examples=30, deadline=None)
@given(lens=lengths, window=st.integers(1, 70000))
def test_cuda_cores_walk_what_lies_before_the_window(lens, window):
    route = ("flashinfer_cuda_core",)
    plain, windowed = (
        OraclePolicy().decide(SHAPE, lens, H200, available=route, options=options)
        for options in (AttentionOptions(), AttentionOptions(window=window))
    )
    assert windowed.prices == plain.prices


@pytest.mark.parametrize("route", OWN_ROUTES)
def test_rows_of_a_window_cost_what_short_rows_cost(route):
    """Where the window begins on a tile and the rows are equally long."""
    options = AttentionOptions(window=4096)
    windowed = makespan_us(H200.routes[route], SHAPE, [40960] * 9, num_sms=132, options=options)
    assert windowed == makespan_us(H200.routes[route], SHAPE, [4096] * 9, num_sms=132)
