"""What a serving run must conserve, whatever the traffic."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import serving_reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, GPT_OSS, MODEL, crowded, kv_gib, make_trace, poisson_trace, steady, waits

from pkvsim.devices.derive import device_routes
from pkvsim.outside.step import StepWork, step_time
from pkvsim.policy.calibrated import CalibratedPolicy
from pkvsim.serving.costs import attention_kinds, page_budget
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import LOG_CAPACITY, SERVED, TOO_LONG_FOR_MODEL, TOO_LONG_FOR_POOL

POLICIES = st.sampled_from(["calibrated", "paper", "flashinfer", "balanced"])


def check_conserved(trace, config, result) -> None:
    requests, steps, totals = result.requests, result.steps, result.totals
    served = requests.rejected == SERVED
    np.testing.assert_array_equal(requests.output_tokens, np.where(served, trace.output_tokens, 0))
    assert np.isnan(requests.finish_s[~served]).all()
    finish, first = requests.finish_s[served], requests.arrival_s[served] + requests.ttft_s[served]
    assert (requests.queue_s[served] >= 0).all() and (requests.ttft_s[served] > requests.queue_s[served]).all()
    assert (finish >= first - 1e-9).all()  # to rounding
    assert result.allocated_pages == result.freed_pages + result.cached_pages
    assert (steps.pages <= result.num_pages).all() and (steps.rows <= config.max_batch).all()
    assert (steps.decode_rows + steps.prefill_tokens <= config.step_tokens).all()
    assert (steps.decode_rows + steps.prefill_tokens > 0).all()  # no step without work
    parts = totals["attention_us"] + totals["rest_us"] + totals["prefill_us"]
    assert parts == pytest.approx(totals["duration_us"], rel=1e-9)
    for column in ("duration_us", "decode_rows", "prefill_tokens"):
        assert getattr(steps, column) @ steps.steps == pytest.approx(totals[column], rel=1e-9)
    # Every output token comes from a decode row or from a prefill's end; a preempted prompt is computed again.
    prefills = requests.output_tokens.sum() - totals["decode_rows"]
    assert served.sum() <= prefills <= served.sum() + requests.preemptions.sum()
    computed = (trace.prompt_tokens - requests.hit_tokens)[served].sum()
    assert totals["prefill_tokens"] >= computed
    if not requests.preemptions.any():
        assert totals["prefill_tokens"] == computed and prefills == served.sum()


@settings(max_examples=150, deadline=None)
@given(crowded(), POLICIES)
def test_tokens_pages_and_time_are_conserved(case, policy) -> None:
    trace, config = case
    check_conserved(trace, config, simulate(trace, MODEL, DEVICE, policy, config))


@settings(max_examples=150, deadline=None)
@given(crowded(blocks=True), st.sampled_from(["lru", "belady", "infinite"]))
def test_conserved_with_a_prefix_cache(case, prefix_cache) -> None:
    trace, config = case
    config = replace(config, prefix_cache=prefix_cache)
    check_conserved(trace, config, simulate(trace, MODEL, DEVICE, "balanced", config))


@settings(max_examples=60, deadline=None)
@given(crowded())
def test_the_gpu_idles_only_when_nobody_is_there(case) -> None:
    trace, config = case
    result = simulate(trace, MODEL, DEVICE, "balanced", config)
    requests, steps = result.requests, result.steps
    served = requests.rejected == SERVED
    ends = steps.start_s + steps.duration_us / 1e6
    for end, start in zip(ends[:-1], steps.start_s[1:]):
        if start > end + 1e-6:
            inside = served & (requests.arrival_s < start - 1e-6) & (requests.finish_s > end + 1e-6)
            assert not inside.any()


@settings(max_examples=60, deadline=None)
@given(crowded(), st.sampled_from([MODEL, GPT_OSS]), st.data())
def test_the_incremental_loop_is_the_plain_one(case, model, data) -> None:
    trace, config = case
    longest = page_budget(model, DEVICE, config) * config.page_size
    fits = trace.prompt_tokens + trace.output_tokens - 1 <= longest
    assume(fits.any())
    trace = replace(
        trace, **{name: getattr(trace, name)[fits] for name in ("arrival_s", "prompt_tokens", "output_tokens")}
    )
    trace, config = data.draw(waits(trace)), replace(config, graphs=False)
    result = simulate(trace, model, DEVICE, "balanced", config)
    expected = serving_reference.serve(trace, model, DEVICE, "balanced", config)
    requests = result.requests
    np.testing.assert_array_equal(requests.preemptions, [request.preemptions for request in expected])
    np.testing.assert_allclose(requests.finish_s, [request.finish_us / 1e6 for request in expected], rtol=1e-9)
    first_s = [(request.first_us - request.arrival_us) / 1e6 for request in expected]
    np.testing.assert_allclose(requests.ttft_s, first_s, rtol=1e-9, atol=1e-12)


def test_a_pool_too_small_for_all_preempts_the_latest() -> None:
    trace = make_trace([(0, 64, 80)] * 4)
    config = ServingConfig(kv_gib=kv_gib(20), keep_free_fraction=0)
    result = simulate(trace, MODEL, DEVICE, "balanced", config)
    check_conserved(trace, config, result)
    preemptions = result.requests.preemptions
    assert preemptions[0] == 0 and preemptions[-1] > 0 and (np.diff(preemptions) >= 0).all()
    assert (np.diff(result.requests.finish_s) >= 0).all()


def test_what_cannot_be_served_is_counted_and_said() -> None:
    trace = make_trace([(0, 100, 4), (0, 1000, 4), (0, MODEL.max_context, 1), (0, MODEL.max_context - 3, 4)])
    result = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(kv_gib=kv_gib(30)))
    reasons = [SERVED, TOO_LONG_FOR_POOL, TOO_LONG_FOR_MODEL, TOO_LONG_FOR_MODEL]
    assert result.requests.rejected.tolist() == reasons
    assert result.summary["rejected_too_long_for_pool"] == 1 and result.summary["rejected_too_long_for_model"] == 2
    assert result.summary["finished"] == 1


@pytest.mark.parametrize("model", [MODEL, GPT_OSS], ids=lambda model: model.name)
def test_a_step_costs_what_its_parts_cost(model) -> None:
    """One request alone: the time of every decode step, from the prices of its length."""
    prompt, output, config = 1000, 5, ServingConfig(graphs=False)
    device, profile = steady(DEVICE), replace(config.profile, attention="policy")
    result = simulate(make_trace([(0, prompt, output)]), model, device, "calibrated", config)
    for step, length in enumerate(range(prompt + 1, prompt + output), start=1):
        expected = step_time(model, device, StepWork(decode_lens=(length,)), profile).us
        for shape, options, layers in attention_kinds(model, 16):
            decision = CalibratedPolicy().decide(shape, np.array([length]), DEVICE, layers=layers, options=options)
            expected += min(decision.prices.values())
        assert result.steps.duration_us[step] == pytest.approx(expected, rel=1e-6)
    assert result.summary["routes"] and sum(result.summary["routes"].values()) == output - 1


@settings(max_examples=25, deadline=None)
@given(lens=st.lists(st.integers(1, 40_000), min_size=1, max_size=12))
def test_a_step_costs_what_the_calibrated_policy_says(lens) -> None:
    """Requests that all come at once and fit one prefill step: the first decode step is decide(layers=)."""
    config = ServingConfig(step_tokens=1 << 19, kv_gib=60, graphs=False)
    result = simulate(make_trace([(0, length, 2) for length in lens]), MODEL, DEVICE, "calibrated", config)
    decision = CalibratedPolicy().decide(MODEL.shape(16), np.array(lens) + 1, DEVICE, layers=MODEL.num_layers)
    assert result.steps.attention_us[1] == pytest.approx(min(decision.prices.values()), rel=1e-9)
    assert result.summary["routes"] == {decision.route: 1}


def test_graphs_leave_the_host_its_planning_alone() -> None:
    trace = make_trace([(0, 500, 3)] * 4)
    for route, planned in (("balanced", 0), ("xqa", 0), ("flashinfer_tensor_core", 1), ("workqueue", 1)):
        eager, graph = (
            simulate(trace, MODEL, DEVICE, route, ServingConfig(graphs=graphs)).steps.attention_us[-1]
            for graphs in (False, True)
        )
        model = device_routes(DEVICE)[route]
        decision = CalibratedPolicy().decide(MODEL.shape(16), np.full(4, 502), DEVICE, available=(route,))
        kernels_us = MODEL.num_layers * decision.layer_us[route] + model.isolated_us
        plan_us = planned * (model.plan_us + 4 * model.plan_row_us)
        assert graph == pytest.approx(kernels_us + plan_us, rel=1e-9) and graph < eager


def test_a_long_run_keeps_a_log_of_bounded_length() -> None:
    output = LOG_CAPACITY + 1001
    trace = make_trace([(0, 16, output)])
    result = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(step_tokens=256))
    assert LOG_CAPACITY // 2 < len(result.steps.steps) <= LOG_CAPACITY and result.steps.steps[0] == 2
    assert result.steps.steps.sum() == output and (np.diff(result.steps.start_s) > 0).all()
    check_conserved(trace, ServingConfig(step_tokens=256), result)


def test_equal_inputs_give_equal_bytes() -> None:
    trace = poisson_trace(200, 20, 700, 60, seed=3)
    first, second = (simulate(trace, MODEL, DEVICE, "calibrated", ServingConfig(max_batch=16)) for _ in range(2))
    assert first.summary == second.summary
    for log in ("requests", "steps"):
        one, other = getattr(first, log), getattr(second, log)
        for name in one.__dataclass_fields__:
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_queue_is_an_md1_queue_where_service_is_constant(load) -> None:
    """One request at a time, one step each: the mean wait of M/D/1 is load / (2 (1 - load)) services.

    The sampling error of 200,000 waits is about 0.5 % at load 0.5 and 1.5 % at 0.8.
    """
    config = ServingConfig(max_batch=1, step_tokens=512)
    device = steady(DEVICE)
    alone = simulate(make_trace([(0, 512, 1)]), MODEL, device, "balanced", config).requests.ttft_s[0]
    trace = poisson_trace(200_000, load / alone, 512, 1, seed=1)
    waits = simulate(trace, MODEL, device, "balanced", config).requests.queue_s
    assert waits.mean() == pytest.approx(load / (2 * (1 - load)) * alone, rel=0.04)


@pytest.mark.parametrize("seed", range(3))
def test_latency_grows_with_the_rate(seed) -> None:
    """Below saturation. 3 % of tolerance: a request that comes a moment earlier may wait out a longer step."""
    means = []
    for rate in (2, 4, 8, 12):
        trace = poisson_trace(1500, 1.0, 2000, 60, seed)
        trace = replace(trace, arrival_s=trace.arrival_s / rate)
        result = simulate(trace, MODEL, steady(DEVICE), "calibrated", ServingConfig())
        assert not result.summary["saturated"]
        means.append((np.mean(result.requests.ttft_s), np.nanmean(result.requests.tpot_s)))
    for slower, faster in zip(means, means[1:]):
        assert faster[0] >= slower[0] * 0.97 and faster[1] >= slower[1] * 0.97
    assert means[-1][0] > means[0][0] and means[-1][1] > means[0][1]


def test_a_queue_that_grows_to_the_end_is_flagged() -> None:
    assert simulate(poisson_trace(800, 60, 4000, 60, 0), MODEL, DEVICE, "calibrated").summary["saturated"]
