"""Rows that hit the same blocks read them once: the groups, what they cost, and where nothing changes."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import BLOCK_TOKENS, DEVICE, GPT_OSS, MODEL, crowded, make_trace

from pkvsim import DecodeShape
from pkvsim.models.presets import kv_bytes_per_token
from pkvsim.pricing.step_times import step_time
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.prefixes import SharingRule, find_prefixes, sharing_rule
from pkvsim.serving.costs import attention_costs, step_models
from pkvsim.serving.prompt_blocks import prompt_blocks
from pkvsim.serving.scheduler import Scheduler
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.shared.grouping import NUM_GROUPS, NUM_ROWS, are_grouped, block_places, group_rows, new_grouping
from pkvsim.serving.simulate import limits_of, requests_of, simulate
from pkvsim.studies.sweep import serving_sweep
from pkvsim.studies.whatif import whatif
from pkvsim.timeline.shared import simulate_shared
from pkvsim.traces.requests import RequestTrace

CONFIG = ServingConfig(prefix_cache="lru")
APART = replace(CONFIG, shared_reads=False)
prompts = st.lists(
    st.tuples(st.just(0.0), st.integers(1, 8 * BLOCK_TOKENS), st.just(1), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    min_size=1, max_size=14,
)  # fmt: skip


def question_trace(groups, *, output=6, block_tokens=512) -> RequestTrace:
    """groups: (rows, common blocks, tokens of each row's own), all sent at once."""
    lengths, hashes, offsets, fresh = [], [], [0], 10**6
    for index, (rows, common, own) in enumerate(groups):
        for _ in range(rows):
            lengths.append(common * block_tokens + own)
            private = -(-own // block_tokens)
            hashes += [1000 * index + at for at in range(common)] + list(range(fresh, fresh + private))
            fresh += private
            offsets.append(len(hashes))
    n = len(lengths)
    return RequestTrace("questions", np.zeros(n), np.array(lengths), np.full(n, output), np.array(hashes),
                        np.array(offsets), block_tokens)  # fmt: skip


def same_rows(decoding, grouping) -> bool:
    return are_grouped.py_func(decoding, grouping.counts[NUM_ROWS], grouping.requests)


def grouped(blocks, places, rows, rule, grouping):
    """[group or -1] of the rows and [tokens, members] of the groups."""
    group_rows(rows, places, blocks.ids, BLOCK_TOKENS, rule.tokens_per_member, rule.least_tokens, grouping)
    groups = int(grouping.counts[NUM_GROUPS])
    return (grouping.group_of_row[: len(rows)].tolist(), grouping.prefix_tokens[:groups].tolist(),
            grouping.members[:groups].tolist())  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(prompts, st.builds(SharingRule, st.integers(0, 30), st.integers(0, 300)), st.randoms(use_true_random=False))
def test_groups_are_those_that_the_engine_finds_in_the_block_table(rows, rule, random) -> None:
    trace = make_trace(rows, blocks=True)
    blocks = prompt_blocks(trace, 16, np.ones(len(trace), bool))
    places = block_places(blocks, trace.prompt_tokens, BLOCK_TOKENS)
    grouping, before = new_grouping(len(trace), len(trace)), None
    for _ in range(5):  # each time over what the ones before have left behind
        decoding = np.array(random.sample(range(len(trace)), random.randint(1, len(trace))))
        assert same_rows(decoding, grouping) == (decoding.tolist() == before)
        before = decoding.tolist()
        of_row, prefixes, members = grouped(blocks, places, decoding, rule, grouping)
        assert same_rows(decoding, grouping)
        assert grouped(blocks, places, decoding, rule, new_grouping(len(trace), len(trace))) == (of_row, prefixes, members)

        ids = [blocks.ids[blocks.offsets[request] : blocks.offsets[request + 1]] for request in decoding]
        table = np.array([np.pad(own, (0, 8 - len(own))) for own in ids])
        found = find_prefixes(table, trace.prompt_tokens[decoding], page_size=BLOCK_TOKENS, rule=rule)
        assert sorted(prefixes) == sorted((found.prefix_pages * BLOCK_TOKENS).tolist())
        for group, (tokens, count) in enumerate(zip(prefixes, members)):
            own = np.flatnonzero(np.array(of_row) == group)
            assert count == len(own) >= 2 and rule.pays(count, tokens)
            assert len({found.group_of_row[row] for row in own}) == 1 and found.group_of_row[own[0]] >= 0
            assert tokens % BLOCK_TOKENS == 0 and tokens <= trace.prompt_tokens[decoding[own]].min()
            assert len({tuple(ids[row][: tokens // BLOCK_TOKENS]) for row in own}) == 1
        assert (np.array(of_row) >= 0).tolist() == (found.group_of_row >= 0).tolist()


@settings(max_examples=40, deadline=None)
@given(crowded(blocks=True), st.sampled_from(["balanced", "calibrated"]))
def test_where_nothing_is_worth_sharing_every_step_is_as_without(case, policy) -> None:
    """Prompts of a few hundred tokens."""
    trace, config = case
    runs = [simulate(trace, MODEL, DEVICE, policy, replace(config, prefix_cache="lru", shared_reads=shared))
            for shared in (True, False)]  # fmt: skip
    assert runs[0].summary["shared_reads"]["steps"] == 0
    assert repr(runs[0].summary) == repr(runs[1].summary)
    for name in runs[0].steps.__slots__:
        np.testing.assert_array_equal(getattr(runs[0].steps, name), getattr(runs[1].steps, name))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 24), st.integers(1, 3000)), min_size=1, max_size=4),
    st.sampled_from(["balanced", "calibrated", "flashinfer"]),
)
def test_attention_is_never_dearer_than_with_every_row_reading_for_itself(groups, policy) -> None:
    trace = question_trace(groups)
    shared, apart = (simulate(trace, MODEL, DEVICE, policy, config) for config in (CONFIG, APART))
    np.testing.assert_array_equal(shared.steps.decode_rows, apart.steps.decode_rows)
    assert (shared.steps.attention_us <= apart.steps.attention_us * (1 + 1e-12)).all()
    assert (shared.steps.attention_us >= shared.steps.best_attention_us * (1 - 1e-12)).all()
    told = shared.summary["shared_reads"]
    assert told["steps"] == np.count_nonzero(shared.steps.attention_us < apart.steps.attention_us)
    assert told["attention_us_apart"] == pytest.approx(apart.totals["attention_us"], rel=1e-9)
    assert told["read_bytes"] <= told["apart_bytes"] / 2 or not told["steps"]
    if policy == "flashinfer":
        assert not told["steps"]
    assert not apart.summary["shared_reads"]["steps"]


def test_the_arithmetic_of_sixteen_questions_on_one_document() -> None:
    """16 rows x (8,192 shared + 300 own): one read of the document serves all, in every step in which all decode."""
    trace = question_trace([(16, 16, 300)], output=24)
    run = simulate(trace, MODEL, DEVICE, "balanced", CONFIG)
    told, attention_us = run.summary["shared_reads"], run.steps.attention_us
    limits = limits_of(MODEL, DEVICE, CONFIG)
    scheduler = Scheduler(requests_of(trace, MODEL, CONFIG, limits), limits)
    model, group = step_models(DEVICE, CONFIG)["balanced"], PrefixGroups(np.zeros(16, np.int32), np.array([512]))
    members, whole = 0, 0
    for at in range(len(attention_us)):
        lens = scheduler.next_step(float(at)).decode_lens
        scheduler.end_step(float(at))
        members += len(lens)
        if len(lens) == 16:
            whole += 1
            layer_us = simulate_shared(model, DecodeShape(32, 8, 128, 16), lens.astype(np.int32), group, DEVICE).closed_us
            step_us = sum(step_time(model.to_row(), 16, len(set(lens.tolist())), MODEL.num_layers, layer_us))
            assert attention_us[at] == pytest.approx(step_us, rel=1e-9)
    assert scheduler.next_work_us(1e9) == np.inf and whole >= 15
    # Fewer rows read for themselves: they would save too little. Of the others each would read the document's tokens.
    document, rows = 8192 * kv_bytes_per_token(MODEL), run.steps.decode_rows
    rule = sharing_rule(DecodeShape(32, 8, 128, 16), bandwidth_gb_per_s=model.bandwidth_gb_s)
    together = np.array([rule.worth(8192 * (count - 1)) for count in rows.astype(int)])
    assert 0 < np.count_nonzero(rows[~together]) and told["steps"] == np.count_nonzero(together)
    assert told["read_bytes"] == told["steps"] * document
    assert told["apart_bytes"] == rows[together].sum() * document and rows.sum() == members
    assert told["step_share"] == pytest.approx(told["steps"] / np.count_nonzero(run.steps.decode_rows))
    assert told["saved_share"] == pytest.approx(1 - run.totals["attention_us"] / told["attention_us_apart"])
    assert told["saved_share"] > 0.4


def test_who_shares_reads() -> None:
    assert CONFIG.shares_reads and not APART.shares_reads and not ServingConfig().shares_reads
    assert not replace(CONFIG, engine="vllm").shares_reads and not replace(CONFIG, kv_parallel=2).shares_reads
    kinds = attention_costs(GPT_OSS, DEVICE, "calibrated", CONFIG).sharing.kinds
    assert kinds.tolist() == [False, True]  # those that slide come first
    trace = question_trace([(12, 16, 100)])
    others = simulate(trace, MODEL, DEVICE, "balanced", replace(CONFIG, engine="vllm"))
    assert others.summary["shared_reads"]["steps"] == 0
    more = question_trace([(24, 16, 100)])  # of heads with half the bytes as many rows save too little
    assert simulate(more, GPT_OSS, DEVICE, "balanced", CONFIG).summary["shared_reads"]["steps"] > 0


def test_whatif_and_sweep_say_what_is_shared() -> None:
    trace = question_trace([(12, 16, 100)])
    report = whatif(trace, MODEL, DEVICE, ["balanced"], CONFIG)
    assert any("--no-shared-reads" in note for note in report.notes) and report.config.to_dict()["shared_reads"]
    assert not any("--no-shared-reads" in n for n in whatif(trace, MODEL, DEVICE, ["balanced"], APART).notes)
    table = serving_sweep({"shared_reads": ("on", "off")}, trace, MODEL, DEVICE, "balanced", CONFIG)
    on, off = table.values("shared_reads.steps")
    assert on == report.results["balanced"].summary["shared_reads"]["steps"] > 0 == off
    with pytest.raises(ValueError, match="shared_reads: expected on or off, got 'yes'"):
        serving_sweep({"shared_reads": ("yes",)}, trace, MODEL, DEVICE, "balanced", CONFIG)
