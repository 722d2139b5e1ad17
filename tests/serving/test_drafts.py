"""Speculative decoding: what a step gives, whose pages it needs, what it costs and what it stands on; and the pages that
recurrent states take the room of."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import make_trace

from pkvsim.devices.device import get_device
from pkvsim.models.model_spec import STATE, AttentionSpec
from pkvsim.models.presets import get_model, weight_bytes
from pkvsim.serving.costs import cache_bytes_per_token, draft_cost, page_budget, state_pages
from pkvsim.serving.queueing.drafts import expected_tokens
from pkvsim.serving.scheduler import Scheduler
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of, requests_of, simulate
from pkvsim.studies.provenance import serving_basis

MODEL = get_model("llama-3.1-8b")
DEVICE = get_device("h200")


def run(trace, **options):
    return simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(**options))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=12),
    query_tokens=st.integers(2, 8), acceptance=st.floats(0, 1), seed=st.integers(0, 99), pages=st.integers(24, 80),
)
def test_every_request_gets_all_its_tokens(lengths, query_tokens, acceptance, seed, pages):
    trace = make_trace([(0.001 * at, prompt, output) for at, (prompt, output) in enumerate(lengths)])
    kv_gib = pages * 16 * cache_bytes_per_token(MODEL, ServingConfig()) / 2**30
    result = run(
        trace, query_tokens=query_tokens, acceptance=acceptance, draft_seed=seed, max_batch=8, kv_gib=kv_gib
    )
    served = result.requests.rejected == 0
    assert (result.requests.output_tokens[served] == trace.output_tokens[served]).all()
    assert result.allocated_pages == result.freed_pages + result.cached_pages
    assert 1 <= (result.summary["tokens_per_decode_row"] or 1) <= query_tokens


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40)), min_size=1, max_size=6),
    query_tokens=st.integers(1, 8), acceptance=st.floats(0, 1), page_size=st.sampled_from([1, 4, 16]),
)  # fmt: skip
def test_a_row_has_pages_for_its_drafts_and_none_beyond_its_answer(lengths, query_tokens, acceptance, page_size):
    """Of the tokens that a step writes for it: drafts past the last token of an answer are none. Where all rows have
    room, a row that decodes holds just these."""
    trace = make_trace([(0.0, prompt, output) for prompt, output in lengths])
    config = ServingConfig(
        query_tokens=query_tokens, acceptance=acceptance if query_tokens > 1 else None, page_size=page_size,
        prefix_cache="none",
    )  # fmt: skip
    limits = limits_of(MODEL, DEVICE, config)
    scheduler = Scheduler(requests_of(trace, MODEL, config, limits), limits)
    state, now_us = scheduler.state, 0.0
    while scheduler.next_work_us(now_us) < np.inf:
        work = scheduler.next_step(now_us)
        for row in work.decode.tolist():
            left = trace.output_tokens[row] - state.generated[row]
            written = state.cached[row] + min(query_tokens, left)
            assert state.private_pages[row] == -(-written // page_size)
            assert written < trace.prompt_tokens[row] + trace.output_tokens[row]  # the last token is never read
        scheduler.end_step(now_us := now_us + 10.0)
    assert (state.generated == trace.output_tokens).all()


@pytest.mark.parametrize(("query_tokens", "acceptance"), [(2, 0.5), (4, 0.7), (8, 0.9), (5, 1.0), (3, 0.0)])
def test_a_step_gives_what_leviathan_expects(query_tokens, acceptance):
    result = run(make_trace([(0.0, 64, 2000)] * 20), query_tokens=query_tokens, acceptance=acceptance)
    given_tokens = result.summary["tokens_per_decode_row"]
    assert given_tokens == pytest.approx(expected_tokens(query_tokens, acceptance), rel=0.02)


def test_drafts_take_their_part_of_a_steps_tokens():
    """Prompts come in while others decode: each row checks 8 tokens of the 64 that a step may have."""
    trace = make_trace([(0.0002 * at, 300, 40) for at in range(12)])
    steps = run(trace, query_tokens=8, acceptance=0.5, max_batch=8, step_tokens=64).steps
    both = (steps.decode_rows > 0) & (steps.prefill_tokens > 0)
    assert both.any() and (8 * steps.decode_rows + steps.prefill_tokens <= 64)[both].all()


def test_what_is_computed_again_is_no_draft_that_was_accepted():
    """A preempted row's prompt gives its next token as it ends; the steps that decode give one a row."""
    kv_gib = 20 * 16 * cache_bytes_per_token(MODEL, ServingConfig()) / 2**30
    result = run(make_trace([(0.0, 64, 90)] * 4), query_tokens=3, acceptance=0.0, kv_gib=kv_gib)
    assert result.requests.preemptions.any() and result.summary["tokens_per_decode_row"] == 1


def test_expected_tokens():
    assert expected_tokens(4, 0.8) == pytest.approx((1 - 0.8**4) / (1 - 0.8)) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    assert expected_tokens(4, 0.0) == 1 and expected_tokens(4, 1.0) == 4


def test_seeds_draw_anew_and_repeat():
    trace = make_trace([(0.0, 64, 300)] * 4)
    first, again, other = (run(trace, query_tokens=3, acceptance=0.5, draft_seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first.requests.finish_s, again.requests.finish_s)
    assert not np.array_equal(first.requests.finish_s, other.requests.finish_s)


def test_drafts_pay_where_they_are_accepted_and_cost_where_not():
    trace = make_trace([(0.0, 512, 400)] * 4)
    plain = run(trace).summary["tpot_s"]["p50"]
    free = run(trace, query_tokens=4, acceptance=0.8).summary["tpot_s"]["p50"]
    refused = run(trace, query_tokens=4, acceptance=0.0).summary["tpot_s"]["p50"]
    costly = run(trace, query_tokens=4, acceptance=0.8, draft_cost=0.1)
    assert free < 0.45 * plain <= plain < refused < 1.2 * plain
    assert costly.summary["tpot_s"]["p50"] == pytest.approx(1.3 * free, rel=0.05)
    assert 0.1 < costly.summary["part_shares"]["drafts"] < 3 * 0.1 / 1.3


def test_the_models_own_prediction_heads_set_the_cost():
    config = ServingConfig(query_tokens=2, acceptance=0.8)
    assert draft_cost(MODEL, config).part == 0 and "lookup" in draft_cost(MODEL, config).source
    layer = MODEL.layers[0]
    headed = replace(MODEL, mtp_layers=(layer,))
    cost = draft_cost(headed, config)
    assert 1 / MODEL.num_layers < cost.part < 4 / MODEL.num_layers and cost.weight_bytes > 0
    rows = serving_basis(headed, DEVICE, config, policies=["balanced"], routes=["balanced"], shares={"drafts": 0.04})
    assert any("Leviathan" in row.source for row in rows)
    assert any(row.quantity.startswith("drafting") and row.time_share == 0.04 for row in rows)


def test_prediction_heads_take_memory_from_the_pages():
    config = ServingConfig(query_tokens=2, acceptance=0.8)
    headed = replace(MODEL, mtp_layers=(MODEL.layers[0],))
    left = DEVICE.memory_gib * config.memory_fraction - config.profile.workspace_gib
    for model, drafts_bytes in ((MODEL, 0.0), (headed, draft_cost(headed, config).weight_bytes)):
        pages = (left * 2**30 - weight_bytes(MODEL) - drafts_bytes) / (16 * 131_072)
        assert page_budget(model, DEVICE, config) == int(pages)
    assert page_budget(headed, DEVICE, ServingConfig()) == page_budget(MODEL, DEVICE, ServingConfig())


def test_recurrent_states_take_pages():
    state = replace(MODEL.layers[0], attention=AttentionSpec(kind=STATE, state_bytes=5 << 20, state_flops=1000))
    hybrid = replace(MODEL, layers=MODEL.layers[:16] + (state,) * 16)
    config = ServingConfig()
    each = state_pages(hybrid, config)
    assert each == -(-16 * (5 << 20) // (16 * 16 * 4096)) and state_pages(MODEL, config) == 0
    kv_gib = (3 * each + 60) * 16 * 16 * 4096 / 2**30
    result = simulate(make_trace([(0.0, 64, 40)] * 8), hybrid, DEVICE, "balanced", ServingConfig(kv_gib=kv_gib))
    assert result.steps.rows.max() == 3 and (result.requests.output_tokens == 40).all()
    assert result.allocated_pages == result.freed_pages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_tokens": 3}, "acceptance: expected a number with query_tokens > 1"),
        ({"acceptance": 0.5}, "acceptance: .* None with 1, got 0.5 with 1"),
        ({"query_tokens": 3, "acceptance": 1.5}, r"acceptance: expected a number in \[0, 1\]"),
        ({"query_tokens": 9, "acceptance": 0.5}, "query_tokens: expected"),
        ({"draft_cost": 0.1}, "draft_cost: expected a number >= 0 with query_tokens > 1"),
        ({"query_tokens": 8, "acceptance": 0.5, "max_batch": 512}, "step_tokens: expected at least max_batch 512 x"),
    ],
)
def test_odd_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServingConfig(**options)
