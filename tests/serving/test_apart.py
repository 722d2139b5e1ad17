"""Prefill and decode on servers of their own."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, MODEL, crowded, make_trace, poisson_trace, steady

from pkvsim.models.model_spec import STATE, AttentionSpec
from pkvsim.outside.step import StepWork, step_time
from pkvsim.serving.apart.stages import serve, transfer_us_per_token
from pkvsim.serving.costs import ENGINE, state_pages
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import SERVED, TOO_LONG_FOR_POOL


def test_a_request_alone_pays_for_each_of_its_parts() -> None:
    device, config = steady(DEVICE), ServingConfig(engine="vllm", prefill_replicas=1)
    run = serve(make_trace([(0, 1000, 3)]), MODEL, device, ENGINE, config)
    prefill = step_time(MODEL, device, StepWork(chunks=((0, 1000),)), config.profile).us
    joins = step_time(MODEL, device, StepWork(chunks=((1000, 1),)), config.profile).us
    decodes = step_time(MODEL, device, StepWork(decode_lens=(1002,)), config.profile).us
    sent = 1000 * transfer_us_per_token(MODEL, device, config)
    assert sent == pytest.approx(1000 * 131_072 / (device.link_gb_s * 1e3))
    log = run.requests
    assert log.ttft_s[0] == pytest.approx((1100 + prefill) / 1e6, rel=1e-9)
    assert log.finish_s[0] == pytest.approx((2200 + prefill + sent + joins + decodes) / 1e6, rel=1e-9)
    assert log.tpot_s[0] == pytest.approx((1100 + sent + joins + decodes) / 2e6, rel=1e-9)
    assert run.summary["itl_s"]["p99"] == pytest.approx((1100 + sent + joins) / 1e6, rel=0.005)
    assert run.gaps.sum() == 2 and run.summary["output_tokens"] == 3


@settings(max_examples=40, deadline=None)
@given(crowded(), st.integers(1, 3), st.integers(1, 3))
def test_every_token_comes_once(case, prompts, replicas) -> None:
    trace, config = case
    both = simulate(trace, MODEL, DEVICE, "balanced", config).requests
    run = serve(trace, MODEL, DEVICE, "balanced", replace(config, prefill_replicas=prompts, replicas=replicas))
    known = run.requests.rejected == SERVED
    np.testing.assert_array_equal(run.requests.rejected, both.rejected)
    np.testing.assert_array_equal(run.requests.output_tokens, np.where(known, trace.output_tokens, 0))
    assert run.gaps.sum() == (trace.output_tokens - 1)[known].sum()
    assert run.allocated_pages == run.freed_pages + run.cached_pages
    log = run.requests
    assert (log.e2e_s[known] >= log.ttft_s[known]).all() and np.isnan(log.finish_s[~known]).all()
    assert run.summary["finished"] == known.sum() and 0 < run.summary["busy_share"] <= 1 + 1e-9


def test_rows_that_decode_wait_for_no_prompts() -> None:
    trace = poisson_trace(200, 6, 4000, 60, seed=0)
    mixed = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(replicas=2)).summary
    apart = serve(trace, MODEL, DEVICE, "balanced", ServingConfig(prefill_replicas=1)).summary
    assert apart["itl_s"]["p99"] < mixed["itl_s"]["p99"] and apart["tpot_s"]["p90"] < mixed["tpot_s"]["p90"]
    slow = serve(trace, MODEL, DEVICE, "balanced", ServingConfig(prefill_replicas=1, transfer_gb_s=1.0)).summary
    assert slow["ttft_s"] == apart["ttft_s"] and slow["e2e_s"]["p50"] > apart["e2e_s"]["p50"] + 0.4


def test_what_waits_for_answers_is_refused() -> None:
    closed = replace(make_trace([(0, 10, 2)] * 3), concurrency=1)
    with pytest.raises(ValueError, match="prefill_replicas: expected requests that wait for no answer"):
        serve(closed, MODEL, DEVICE, "balanced", ServingConfig(prefill_replicas=1))
    with pytest.raises(ValueError, match="transfer_gb_s: expected a number > 0"):
        ServingConfig(transfer_gb_s=0)


def test_what_states_leave_no_pages_for_is_refused_before_its_prompt_is_computed() -> None:
    state = replace(MODEL.layers[0], attention=AttentionSpec(kind=STATE, state_bytes=5 << 20, state_flops=1000))
    hybrid = replace(MODEL, layers=MODEL.layers[:16] + (state,) * 16)
    pages = state_pages(hybrid, ServingConfig()) + 20
    config = ServingConfig(kv_gib=pages * 16 * 16 * 4096 / 2**30, prefill_replicas=1)
    run = serve(make_trace([(0, 200, 400), (0, 200, 10)]), hybrid, DEVICE, "balanced", config)
    alone = serve(make_trace([(0, 200, 10)]), hybrid, DEVICE, "balanced", config)
    assert run.requests.rejected.tolist() == [TOO_LONG_FOR_POOL, SERVED]
    assert run.requests.ttft_s[1] == alone.requests.ttft_s[0]
