"""The calibrated policy, its oracle and the fixed routes."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import DecodeShape, make_schedule
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.policy.by_name import POLICIES, CalibratedPolicy, FixedPolicy, OraclePolicy, PaperPolicy, make_policy
from pkvsim.policy.choose import cheapest, new_prices
from pkvsim.pricing.cuts import sorted_lengths
from pkvsim.pricing.step_times import step_times
from pkvsim.studies.replay import replay
from pkvsim.timeline.timeline import simulate
from pkvsim.traces.paper_families import paper_trace

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
H200 = get_device("h200")
lengths = st.lists(st.integers(0, 60000), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(lens=lengths, layers=st.integers(1, 64), available=st.sets(st.sampled_from(ROUTES), min_size=1))
def test_takes_the_cheapest_of_what_is_available(lens, layers, available):
    available = tuple(sorted(available))
    decision = CalibratedPolicy().decide(SHAPE, lens, H200, layers=layers, available=available)
    assert set(decision.prices) == set(available)
    assert decision.prices[decision.route] == min(decision.prices.values())
    assert (decision.splits is not None) == (decision.route in ("split", "workqueue"))
    if decision.splits is not None:
        assert decision.splits.shape == (len(lens),) and decision.splits.min() >= 1
        make_schedule(decision.route, SHAPE, lens, splits=decision.splits)
    assert decision.reason


@settings(max_examples=40, deadline=None)
@given(lens=lengths.filter(any), layers=st.integers(1, 64))
def test_layers_multiply_the_kernel_and_not_the_plan(lens, layers):
    """By the wall clock; where the host issues layers more slowly than the GPU ends them, that is what they take."""
    one, many = (CalibratedPolicy().decide(SHAPE, lens, H200, layers=n) for n in (1, layers))
    for route, us in one.prices.items():
        model = H200.routes[route]
        assert one.layer_us[route] == many.layer_us[route]
        further = (layers - 1) * max(one.layer_us[route], model.run_us)
        assert many.prices[route] == pytest.approx(us + further)
        gpu_us = many.prices[route] - many.host_us[route]
        assert gpu_us == pytest.approx(model.isolated_us + layers * one.layer_us[route])
    assert one.host_us["flashinfer_tensor_core"] > 100 and one.host_us["balanced"] < 50


def test_planning_grows_with_rows_and_distinct_lengths():
    model = replace(H200.routes["split"], plan_us=100.0, plan_row_us=2.0, plan_length_us=30.0, host_us=7.0, run_us=0.0)
    constants, gpu_us, host_us = model.to_row()[None], np.empty(1), np.empty(1)
    for lens, plan_us in (([9, 9, 9], 106), ([9, 8, 9, 0], 136), ([3, 2, 1], 166), ([0], 100)):
        step_times(sorted_lengths(np.array(lens, np.int32)), 3, constants, np.full(1, 11.0), gpu_us, host_us)
        assert host_us == plan_us + 7 and gpu_us == model.isolated_us + 33


def test_reasons():
    decision = CalibratedPolicy().decide(SHAPE, np.array([8192] * 8, np.int32), H200)
    assert decision.route == "balanced"
    assert "8 rows, 268 MB of KV" in decision.reason and "on the host" in decision.reason
    assert CalibratedPolicy().decide(SHAPE, [0, 0], H200).reason == "no active row"


@settings(max_examples=40, deadline=None)
@given(lens=lengths.filter(any))
def test_the_margin_is_a_part_of_the_next_price(lens):
    decision = CalibratedPolicy().decide(SHAPE, lens, H200)
    taken, following = sorted(decision.prices.values())[:2]
    assert f", {100 * (following - taken) / following:.0f}% under the next for " in decision.reason


def test_pinned_splits():
    policy = CalibratedPolicy(split_splits=7, workqueue_splits=5)
    lens = np.array([30000, 2000], np.int32)
    for route, pinned in (("split", 7), ("workqueue", 5)):
        decision = policy.decide(SHAPE, lens, H200, available=(route,))
        assert decision.splits.tolist() == [pinned] * 2
        free = CalibratedPolicy().decide(SHAPE, lens, H200, available=(route,))
        assert decision.prices[route] != free.prices[route]


@settings(max_examples=15, deadline=None)
@given(lens=lengths)
def test_oracle_prices_are_the_timelines(lens):
    decision = OraclePolicy().decide(SHAPE, lens, H200, available=OWN_ROUTES)
    for route in OWN_ROUTES:
        lane = simulate(H200.routes[route], SHAPE, lens, num_sms=H200.num_sms)
        kernel_us = decision.prices[route] - decision.host_us[route] - H200.routes[route].isolated_us
        assert kernel_us == pytest.approx(lane.makespan_us)


def test_oracle_prices_pinned_splits_as_they_are_pinned():
    lens = np.array([30000, 2000], np.int32)
    decision = OraclePolicy(split_splits=7, workqueue_splits=5).decide(SHAPE, lens, H200)
    for route, splits in (("split", 7), ("workqueue", 5)):
        line = simulate(H200.routes[route], SHAPE, lens, num_sms=H200.num_sms, splits=splits)
        assert decision.layer_us[route] == line.makespan_us


@given(
    us=st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([0.0, 1.0]), st.booleans()),
                min_size=len(ROUTES), max_size=len(ROUTES))
)  # fmt: skip
def test_of_equal_routes_the_first_is_taken(us):
    prices = new_prices()
    prices.gpu_us[:], prices.host_us[:] = [gpu for gpu, _, _ in us], [host for _, host, _ in us]
    allowed = [(gpu + host, at) for at, (gpu, host, may) in enumerate(us) if may]
    found = cheapest(np.array([may for _, _, may in us]), prices)
    assert found == (min(allowed)[1] if allowed else -1)


def test_the_model_regrets_little_by_its_own_oracle():
    """Chosen by the closed form and paid by the timeline, a step costs at most 5 % more than the oracle's choice."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        lens = rng.integers(256, 50000, int(2 ** rng.uniform(0, 6))).astype(np.int32)
        paid = OraclePolicy().decide(SHAPE, lens, H200, layers=32)
        chosen = CalibratedPolicy().decide(SHAPE, lens, H200, layers=32).route
        assert paid.prices[chosen] <= 1.05 * paid.prices[paid.route]


def test_fixed_routes():
    lens = np.array([4096, 100], np.int32)
    for route in ROUTES:
        decision = FixedPolicy(route).decide(SHAPE, lens, H200)
        assert decision.route == route and set(decision.prices) == set(ROUTES)
    with pytest.raises(ValueError, match="available: expected xqa among them, got split, workqueue"):
        FixedPolicy("xqa").decide(SHAPE, lens, H200, available=("split", "workqueue"))


def test_paper_policy_without_flashinfer():
    decision = PaperPolicy().decide(SHAPE, np.array([1000], np.int32), get_device("rtx3060"), available=OWN_ROUTES)
    assert decision.route in ("split", "workqueue") and "not available" in decision.reason


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_replays(name):
    trace = paper_trace("bimodal", 1, 6, 3, 3)
    report = replay(trace, SHAPE, H200, make_policy(name))
    assert report["policy"] == name
    assert sum(report["engines"]["adaptive"]["routes"].values()) == 3
    if name in ("calibrated", "oracle"):
        others = [e["predicted_step_us"] for engine, e in report["engines"].items() if engine != "adaptive"]
        assert report["engines"]["adaptive"]["predicted_step_us"] <= min(others) * (1 + 1e-9)


def test_bad_arguments():
    with pytest.raises(ValueError, match="available: expected some of flashinfer_cuda_core, .*, got \\('warp',\\)"):
        CalibratedPolicy().decide(SHAPE, [1], H200, available=("warp",))
    with pytest.raises(ValueError, match="available: expected a route that rtx3060 has a model of, got xqa"):
        CalibratedPolicy().decide(SHAPE, [1], get_device("rtx3060"), available=("xqa",))
    with pytest.raises(ValueError, match="split_splits: expected an integer in .1, 2147483647., got 0"):
        CalibratedPolicy(split_splits=0)
    with pytest.raises(ValueError, match="seq_lens.0.: expected a length"):
        CalibratedPolicy().decide(SHAPE, [-1], H200)
    with pytest.raises(ValueError, match="policy: expected one of paper, calibrated"):
        make_policy("best")
    with pytest.raises(ValueError, match="min_context: expected none with the policy calibrated, got 0"):
        make_policy("calibrated", min_context=0)
    with pytest.raises(ValueError, match="route: expected one of"):
        FixedPolicy("paper")
