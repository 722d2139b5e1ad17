"""What must hold between runs: more of a good thing is no worse, and nothing depends on when the clock starts."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import BLOCK_TOKENS, DEVICE, MODEL, crowded, kv_gib, make_trace, steady

from pkvsim.memory.tier_options import TierSetup
from pkvsim.memory.tier_presets import find_tiers
from pkvsim.models.model_costs import kv_bytes_per_token
from pkvsim.serving.apart.stages import serve
from pkvsim.serving.costs import ENGINE, page_budget
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate

POLICIES = st.sampled_from(["calibrated", "balanced", "flashinfer", "oracle"])
AT_ONCE = st.lists(st.tuples(st.just(0.0), st.integers(1, 3000), st.integers(1, 20)), min_size=1, max_size=12)
NOTHING = find_tiers([f"host:{BLOCK_TOKENS * 131_072 - 4096}:50"], {})  # not a block's room


@settings(max_examples=15, deadline=None)
@given(crowded(), POLICIES, st.floats(0.1, 1e6))
def test_when_the_clock_starts_changes_nothing(case, policy, later_s) -> None:
    trace, config = case
    here = simulate(trace, MODEL, DEVICE, policy, config).requests
    there = simulate(replace(trace, arrival_s=trace.arrival_s + later_s), MODEL, DEVICE, policy, config).requests
    np.testing.assert_allclose(there.arrival_s, here.arrival_s, atol=1e-9)
    np.testing.assert_array_equal(there.rejected, here.rejected)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 20)), min_size=2, max_size=8), POLICIES)
def test_requests_far_apart_are_served_as_if_alone(lengths, policy) -> None:
    run = simulate(make_trace([(1e3, *one) for one in lengths]), MODEL, DEVICE, policy).requests
    for at, one in enumerate(lengths):
        alone = simulate(make_trace([(0, *one)]), MODEL, DEVICE, policy).requests
        assert run.ttft_s[at] == pytest.approx(alone.ttft_s[0], rel=1e-6)
        assert run.e2e_s[at] == pytest.approx(alone.e2e_s[0], rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(AT_ONCE, st.sampled_from(["calibrated", "balanced", "flashinfer", ENGINE]), st.floats(1, 3),
       st.sampled_from(["beta_gb_s", "fp16_tflops"]))  # fmt: skip
def test_a_gpu_that_reads_or_multiplies_faster_is_no_slower(rows, policy, faster, what) -> None:
    """All at once, so that no request comes a moment too late for a step of the faster GPU."""
    better = replace(DEVICE, **{what: getattr(DEVICE, what) * faster})
    config = ServingConfig(engine="vllm" if policy == ENGINE else "pkv")
    slow, fast = (simulate(make_trace(rows), MODEL, gpu, policy, config).requests for gpu in (DEVICE, better))
    for name in ("ttft_s", "finish_s"):
        assert (getattr(fast, name) <= getattr(slow, name) * (1 + 1e-9)).all()


@settings(max_examples=25, deadline=None)
@given(AT_ONCE, st.integers(1, 4))
def test_more_memory_preempts_nobody_else_and_serves_whom_less_does(rows, times) -> None:
    """Of requests that are all there, whose room is then the only reason for which one waits."""
    pages = 200
    runs = [
        simulate(make_trace(rows), MODEL, steady(DEVICE), "balanced", ServingConfig(kv_gib=kv_gib(pages * n)))
        for n in (1, times) if any(row[1] + row[2] <= 16 * pages for row in rows)
    ]  # fmt: skip
    if runs:
        less, more = (run.requests for run in runs)
        assert more.preemptions.sum() <= less.preemptions.sum()
        assert ((more.rejected == 0) >= (less.rejected == 0)).all()


@settings(max_examples=30, deadline=None)
@given(crowded(blocks=True), st.sampled_from(["lru", "belady", "infinite"]))
def test_a_prefix_cache_saves_prefill_and_counts_what_it_saves(case, kind) -> None:
    trace, config = case
    without = simulate(trace, MODEL, DEVICE, "balanced", config)
    run = simulate(trace, MODEL, DEVICE, "balanced", replace(config, prefix_cache=kind))
    same = not (run.requests.preemptions.any() or without.requests.preemptions.any())
    if same and (run.requests.rejected == without.requests.rejected).all():
        saved = without.totals["prefill_tokens"] - run.totals["prefill_tokens"]
        assert saved == run.summary["prefix_hit_tokens"] >= 0


@settings(max_examples=15, deadline=None)
@given(crowded(blocks=True))
def test_a_tier_without_a_block_s_room_changes_nothing(case) -> None:
    trace, config = case
    config = replace(config, prefix_cache="lru")
    with_tier = simulate(trace, MODEL, DEVICE, "balanced", replace(config, tiers=TierSetup(tiers=NOTHING)))
    without = simulate(trace, MODEL, DEVICE, "balanced", config)
    np.testing.assert_array_equal(with_tier.requests.finish_s, without.requests.finish_s)
    assert not with_tier.tiers.log.tokens.any()


@settings(max_examples=15, deadline=None)
@given(crowded(blocks=True), POLICIES)
def test_options_at_their_neutral_values_change_nothing(case, policy) -> None:
    trace, config = case
    plain = simulate(trace, MODEL, DEVICE, policy, config).summary
    for neutral in (
        {"prefill_replicas": 0, "transfer_gb_s": 1.0}, {"router": "prefix"}, {"draft_seed": 7}, {"kv_ttl_s": 0.0},
        {"shared_reads": False}, {"kv_parallel": 1, "replicas": 1},
    ):
        assert serve(trace, MODEL, DEVICE, policy, replace(config, **neutral)).summary == plain


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_pages_of_8_bits_are_twice_as_many_less_their_scales(kv_dtype) -> None:
    whole = page_budget(MODEL, DEVICE, ServingConfig())
    times = page_budget(MODEL, DEVICE, ServingConfig(kv_dtype=kv_dtype)) / whole
    assert 1.9 < times < 2.001 and kv_bytes_per_token(MODEL) == 131_072
