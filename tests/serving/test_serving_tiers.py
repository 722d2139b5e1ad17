"""Tiers behind the simulated server: nothing changes where nothing is loaded, TTFT adds up, loads take their time."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import BLOCK_TOKENS, DEVICE, MODEL, crowded, make_trace, steady

from pkvsim.memory.tier_options import TierSetup
from pkvsim.memory.tier_presets import find_tiers
from pkvsim.models.presets import get_model, kv_bytes_per_token
from pkvsim.outside.step import StepWork, step_time
from pkvsim.outside.step_costs import PARTS, step_parts
from pkvsim.serving.costs import outside_costs
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import SERVED
from pkvsim.serving.tiers.prompt_prices import chunk_table_us, prompt_us

BLOCK_BYTES = BLOCK_TOKENS * kv_bytes_per_token(MODEL)
FAST = find_tiers(["host:1TiB:1000"], {})


def run(trace, config, **setup):
    tiers = {"tiers": FAST, "host_link_gb_s": 1e6} | setup
    return simulate(trace, MODEL, DEVICE, "balanced", replace(config, tiers=TierSetup(**tiers)))


@settings(max_examples=40, deadline=None)
@given(crowded(blocks=True), st.sampled_from(["none", "lru"]), st.sampled_from(["pkv", "vllm"]))
def test_tiers_that_give_nothing_change_nothing(case, prefix_cache, engine) -> None:
    trace, config = case
    config = replace(config, prefix_cache=prefix_cache, engine=engine)
    if engine == "vllm":  # whose admissions take a chunk's pages, and with tiers the whole prompt's: room for all
        config = replace(config, kv_gib=8.0)
    with_tiers = run(trace, config, load="recompute")
    without = simulate(trace, MODEL, DEVICE, "balanced", config)
    for name in ("queue_s", "ttft_s", "finish_s", "hit_tokens", "preemptions"):
        np.testing.assert_array_equal(getattr(with_tiers.requests, name), getattr(without.requests, name))
    assert not with_tiers.tiers.log.tokens.any()
    served = without.requests.rejected == SERVED
    assert bool(with_tiers.tiers.log.counts.stored) == bool((trace.prompt_tokens[served] >= BLOCK_TOKENS).any())


@settings(max_examples=40, deadline=None)
@given(crowded(blocks=True), st.sampled_from(["pkv", "vllm"]), st.sampled_from(["load", "price"]),
       st.sampled_from([["host:1GiB:50", "disk:1GiB:2"], ["host:1MiB:50", "disk:64MiB:0.01"]]),
       st.sampled_from([None, 0.0]))  # fmt: skip
def test_every_request_is_served_and_its_first_token_adds_up(case, engine, load, tiers, hold_cost) -> None:
    trace, config = case
    trace = replace(trace, session=np.arange(len(trace)) % 3)
    result = run(trace, replace(config, engine=engine), load=load, tiers=find_tiers(tiers, {}), hold_cost=hold_cost)
    served = result.requests.rejected == SERVED
    assert (result.requests.output_tokens[served] == trace.output_tokens[served]).all()
    log, requests = result.tiers.log, result.requests
    once = served & (requests.preemptions == 0)
    parts = requests.queue_s + log.exposed_s + result.tiers.compute_s
    np.testing.assert_allclose(parts[once], requests.ttft_s[once])
    assert (result.tiers.compute_s[once] > 0).all() and (log.exposed_s <= log.load_s + 1e-12).all()
    assert (log.tokens[once].sum(axis=1) <= log.hit_blocks[once] * BLOCK_TOKENS).all()
    if load == "load":
        assert (log.tokens[once].sum(axis=1) == log.hit_blocks[once] * BLOCK_TOKENS).all()
    assert (log.blocked_s.max(axis=1) <= log.load_s + 1e-12).all()
    for tier in range(2):
        for is_write in (False, True):
            spans = [(one.begin_s, one.end_s) for one in log.work if (one.tier, one.is_write) == (tier, is_write)]
            assert all(before[1] <= after[0] + 1e-9 for before, after in zip(spans, spans[1:]))


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.1]), st.integers(1, 40), st.integers(0, 2)), min_size=2,
                     max_size=12),
    step_tokens=st.sampled_from([64, 256, 2048]), write_gb_s=st.sampled_from([0.05, 1000]),
    load=st.sampled_from(["load", "price"]),
)  # fmt: skip
def test_prompts_are_written_as_they_have_been_computed(prompts, step_tokens, write_gb_s, load) -> None:
    """One after the other in the order of their first tokens, whichever was admitted first: some wait for a slow disk
    meanwhile. None is written before it is there, nor before the disk has written what was computed before."""
    rows = [(gap_s, blocks * BLOCK_TOKENS + 1, 3, [tree]) for gap_s, blocks, tree in prompts]
    trace = make_trace([(0.0, *rows[0][1:]), *rows[1:]], blocks=True)
    tiers = tuple(replace(tier, write_bytes_per_s=write_gb_s * 1e9) for tier in find_tiers(["disk:1TiB:0.5"], {}))
    config = ServingConfig(step_tokens=step_tokens, max_batch=16, prefix_cache="none")
    result = run(trace, config, load=load, tiers=tiers)
    computed_s = trace.arrival_s + result.requests.ttft_s
    free_s, stored = 0.0, set()
    written = {work.request: work for work in result.tiers.log.work if work.is_write}
    for request in np.argsort(computed_s, kind="stable").tolist():
        begin = int(trace.block_offsets[request])
        blocks = set(trace.block_hashes[begin : begin + trace.prompt_tokens[request] // BLOCK_TOKENS].tolist())
        new, stored = len(blocks - stored), stored | blocks
        assert (request in written) == (new > 0)
        if new:
            work, seconds = written[request], new * BLOCK_BYTES / (write_gb_s * 1e9)
            begin_s = max(computed_s[request], free_s)
            assert work.begin_s == pytest.approx(begin_s, abs=1e-9) and work.num_bytes == new * BLOCK_BYTES
            free_s = work.end_s
            assert free_s == pytest.approx(begin_s + seconds, abs=1e-9)


def test_a_prompt_that_comes_again_is_loaded() -> None:
    blocks = 128  # whose prompt takes longer than the host to issue a step
    rows = [(0.0, blocks * BLOCK_TOKENS + 1, 1, [0]), (100.0, blocks * BLOCK_TOKENS + 1, 1, [0])]
    config = ServingConfig(step_tokens=2048)
    slow = run(make_trace(rows, blocks=True), config, load="load", tiers=find_tiers(["disk:1TiB:1"], {}))
    seconds = blocks * BLOCK_BYTES / 1e9
    assert slow.tiers.log.load_s[1] == pytest.approx(seconds) and slow.requests.ttft_s[1] > seconds
    assert slow.requests.ttft_s[1] - seconds < slow.requests.ttft_s[0] / 4  # one token is computed
    by_price = run(make_trace(rows, blocks=True), config, tiers=find_tiers(["disk:1TiB:1"], {}))
    assert by_price.requests.ttft_s[1] <= by_price.requests.ttft_s[0] * (1 + 1e-9)
    host = run(make_trace(rows, blocks=True), config, load="load", tiers=find_tiers(["host:1TiB:1"], {}))
    assert host.tiers.log.exposed_s[1] < host.tiers.log.load_s[1]  # the first layers are attended to before
    linked = run(make_trace(rows, blocks=True), config, load="load", host_link_gb_s=0.5)
    assert linked.tiers.log.load_s[1] == pytest.approx(2 * seconds)


def small_tier(blocks: int, **setup) -> dict:
    """A host's memory with room for so many blocks, read and written in no time."""
    (tier,) = FAST
    return {"tiers": (replace(tier, capacity_bytes=blocks * BLOCK_BYTES),), **setup}


def test_what_is_written_gives_way_to_what_is_computed_after_it() -> None:
    """Two prompts are computed one after the other before anybody asks; the tier has room for one of them."""
    blocks, config = 40, ServingConfig(step_tokens=64, max_batch=4, prefix_cache="none")
    first, second = ((gap_s, blocks * BLOCK_TOKENS + 1, 1, [tree]) for gap_s, tree in ((0.0, 0), (0.0, 1)))
    rows = [first, second, (100.0, *second[1:]), (100.0, *first[1:])]
    found = run(make_trace(rows, blocks=True), config, **small_tier(blocks, load="load"))
    assert found.tiers.log.hit_blocks.tolist() == [0, 0, blocks, 0] and found.tiers.log.counts.refused == 0


def test_what_is_asked_for_is_not_given_up_for_what_is_computed_meanwhile() -> None:
    """Computed again, but still there: of two prompts in a tier that has room for both, the other one goes."""
    blocks, config = 40, ServingConfig(step_tokens=64, max_batch=4, prefix_cache="none")
    kept, gone, new = ((blocks * BLOCK_TOKENS + 1, 1, [tree]) for tree in range(3))
    rows = [(0.0, *kept), (100.0, *gone), (100.0, *new), (0.0, *kept), (0.0, *kept)]
    found = run(make_trace(rows, blocks=True), config, **small_tier(2 * blocks, load="recompute"))
    written = [(work.request, work.num_bytes) for work in found.tiers.log.work]
    assert written == [(at, blocks * BLOCK_BYTES) for at in range(3)]


@pytest.mark.parametrize("rate_gb_s", [1, 20, 400])
def test_layers_that_arrive_one_by_one_hide_what_computes_meanwhile(rate_gb_s) -> None:
    """All but the last token are loaded: of the load is left what its computation leaves of it, or the first layer."""
    device, blocks = steady(DEVICE), 64
    rows = [(0.0, blocks * BLOCK_TOKENS + 1, 1, [0]), (100.0, blocks * BLOCK_TOKENS + 1, 1, [0])]
    setup = TierSetup(tiers=find_tiers([f"host:1TiB:{rate_gb_s}"], {}), host_link_gb_s=1e6, load="load")
    config = ServingConfig(step_tokens=2048, tiers=setup)
    found = simulate(make_trace(rows, blocks=True), MODEL, device, "balanced", config)
    load_s, layers = blocks * BLOCK_BYTES / (rate_gb_s * 1e9), MODEL.num_layers
    work = StepWork(chunks=((blocks * BLOCK_TOKENS, 1),))
    compute_s = step_time(MODEL, device, work, config.profile).us / 1e6
    left_s = max(load_s / layers, load_s - compute_s * (layers - 1) / layers)
    assert found.tiers.log.load_s[1] == pytest.approx(load_s)
    assert found.tiers.log.exposed_s[1] == pytest.approx(left_s, rel=1e-6)
    (read,) = [work for work in found.tiers.log.work if not work.is_write]
    summary = found.summary["tiers"]["devices"]["host"]
    assert read.num_bytes == summary["read_bytes"] == blocks * BLOCK_BYTES and summary["written_bytes"] > 0
    assert summary["busy_share"] == pytest.approx(load_s / found.summary["makespan_s"])


def test_blocks_lie_on_tiers_for_all_gpus_of_a_model_and_come_over_all_their_links() -> None:
    blocks = 64
    rows = [(0.0, blocks * BLOCK_TOKENS + 1, 1, [0]), (100.0, blocks * BLOCK_TOKENS + 1, 1, [0])]
    setup = TierSetup(tiers=FAST, host_link_gb_s=1.0, load="load")
    for ranks in (1, 2, 4):
        model = get_model("llama-3.1-8b", tensor_parallel=ranks)
        log = simulate(make_trace(rows, blocks=True), model, DEVICE, "balanced", ServingConfig(tiers=setup)).tiers.log
        assert {work.num_bytes for work in log.work} == {blocks * BLOCK_BYTES}
        assert log.load_s[1] == pytest.approx(blocks * BLOCK_BYTES / (ranks * 1e9), rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=4), st.integers(1, 3000), st.sampled_from([256, 2048]))
def test_the_rest_of_a_prompt_costs_the_steps_that_compute_it(begins, rest, step_tokens) -> None:
    """In steps as large as they may be, one after the other on a warm GPU, whose attention grows evenly."""
    config = ServingConfig(step_tokens=step_tokens)
    costs, end = outside_costs(MODEL, DEVICE, "balanced", config), max(begins) + rest
    table_us = chunk_table_us(costs, config.step_tokens)
    parts, nobody = np.zeros(len(PARTS)), np.zeros(0, np.int64)
    for begin, us in zip(begins, prompt_us(costs, table_us, np.array(begins), end)):
        expected = 0.0
        for first in range(begin, end, config.step_tokens):
            chunk = min(config.step_tokens, end - first)
            expected += step_parts(costs, nobody, np.array([first]), np.array([chunk]), 1, 0.0, 1.0, parts)
        assert us == pytest.approx(expected, rel=1e-9 if end - begin <= config.step_tokens else 0.02)


def test_decoding_rows_go_on_while_a_prompt_loads() -> None:
    prompt = 64 * BLOCK_TOKENS + 1
    rows = [(0.0, prompt, 1, [0]), (100.0, 33, 200, [1]), (0.01, prompt, 1, [0])]
    result = run(make_trace(rows, blocks=True), ServingConfig(), load="load", tiers=find_tiers(["disk:1TiB:0.5"], {}))
    load_s = result.tiers.log.load_s[2]
    assert load_s > 0.4 and result.requests.finish_s[1] - result.requests.arrival_s[1] < 2 * load_s + 1
    steps = result.steps
    while_loading = (steps.start_s > 100.011) & (steps.start_s < 100.01 + load_s)
    assert steps.decode_rows[while_loading].sum() > 20 and not steps.prefill_tokens[while_loading].any()


@settings(max_examples=30, deadline=None)
@given(crowded(blocks=True, serial=True), st.integers(1, 40))
def test_no_retention_loads_more_than_a_tier_that_keeps_everything(case, slots) -> None:
    """One request at a time, whole blocks alone."""
    trace, config = case
    tiers = (replace(FAST[0], capacity_bytes=slots * BLOCK_BYTES),)
    some = {name: run(trace, config, load="load", retention=name, tiers=tiers) for name in ("lru", "belady")}
    most = run(trace, config, load="load").tiers.log.tokens.sum()
    assert all(result.tiers.log.tokens.sum() <= most for result in some.values())


def test_a_conversation_is_held_for_its_next_turn_where_that_pays() -> None:
    """Two turns of every conversation with other prompts between them, in a tier that holds two prompts."""
    tokens, rows, sessions = 64 * BLOCK_TOKENS, [], []
    for at in range(16):
        for pause, prompt, session in ((60.0, at, at), (1.0, 100 + at, -1), (1.0, 200 + at, -1), (1.0, at, at)):
            rows.append((pause, tokens + 1, 1, [prompt]))
            sessions.append(session)
    trace = replace(make_trace(rows, blocks=True), session=np.array(sessions))
    tiers = (replace(FAST[0], capacity_bytes=2 * 64 * BLOCK_BYTES),)

    def loaded(cost: float | None) -> int:
        return int(run(trace, ServingConfig(), load="load", tiers=tiers, hold_cost=cost).tiers.log.tokens.sum())

    assert loaded(None) == loaded(100.0) == 0
    assert 14 * tokens <= loaded(1e-3) <= 16 * tokens  # the first gap is not known before


def test_refusals() -> None:
    trace = make_trace([(0.0, 64, 1)])
    with pytest.raises(ValueError, match="tier: expected a trace with block hashes"):
        run(trace, ServingConfig())
    with pytest.raises(ValueError, match="tier: expected one server"):
        run(make_trace([(0.0, 64, 1, [0])], blocks=True), ServingConfig(replicas=2))
    with pytest.raises(ValueError, match="tier_hold_cost: expected a trace with sessions"):
        run(make_trace([(0.0, 64, 1, [0])], blocks=True), ServingConfig(), hold_cost=1.0)
    for wrong, name in (({"load": "some"}, "load_or_recompute"), ({"hold_cost": -1.0}, "^tier_hold_cost"), ({"host_link_gb_s": 0}, "host_link"),
                        ({"placement": "x"}, "placement"), ({"tiers": ()}, "tiers")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            TierSetup(**{"tiers": FAST} | wrong)
    for texts in (["nowhere"], ["host:1GiB"], ["a:1GiB:1", "a:1GiB:1"]):
        with pytest.raises(ValueError, match="tier"):
            find_tiers(texts, {})
