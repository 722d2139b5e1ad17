"""Objectives: how they are written, when they are kept, and what the requests that keep them add up to."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, MODEL, crowded, poisson_trace

from pkvsim.serving.simulate import simulate
from pkvsim.studies.objectives import METRICS, UNITS, Objective, evaluate, goodput, parse_objectives

OBJECTIVES = st.builds(
    Objective, st.sampled_from(list(METRICS)), st.integers(1, 1000).map(lambda tenths: tenths / 10),
    st.integers(1, 10**7).map(lambda us: us / 1e6),
)
OF_REQUESTS = OBJECTIVES.filter(lambda one: one.metric != "itl")


@given(st.lists(OBJECTIVES, min_size=1, max_size=5, unique_by=lambda one: one.name))
def test_what_is_written_is_read_back(objectives) -> None:
    read = parse_objectives(", ".join(map(str, objectives)))
    assert [one.name for one in read] == [one.name for one in objectives]
    assert [one.bound_s for one in read] == pytest.approx([one.bound_s for one in objectives], rel=1e-11)


@given(st.sampled_from(sorted(UNITS)), st.floats(1e-3, 1e6))
def test_units(unit, number) -> None:
    (one,) = parse_objectives(f"TTFT_p99 = {number!r}{unit}")
    assert (one.metric, one.percentile) == ("ttft", 99) and one.bound_s == number * UNITS[unit]


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected METRIC_pNN=TIME"), ("ttft_p90", "expected METRIC_pNN=TIME"), ("ttft=2s", "expected METRIC_pNN=TIME"),
    ("ttft_p90=2", "expected a time in us, ms, s, min, got '2'"), ("ttft_p90=2h", "expected a time in"),
    ("gap_p90=2s", "expected a metric of ttft, tpot, e2e, queue, itl, got 'gap'"), ("ttft_p90=-2s", "expected METRIC"),
    ("ttft_p0=2s", "expected a percentile in (0, 100]"), ("ttft_p101=2s", "expected a percentile in (0, 100]"),
    ("ttft_p90=0s", "expected a time > 0"), ("ttft_p90=1e400s", "expected a time > 0"),
    ("ttft_p90=2s,,", "expected METRIC_pNN=TIME"), ("ttft_p90=2s,ttft_p90.0=3s", "ttft_p90 twice"),
    ("ttft_p90=2s\x00", "expected METRIC_pNN=TIME"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(text, message) -> None:
    with pytest.raises(ValueError) as refused:
        parse_objectives(text)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text) -> None:
    try:
        assert parse_objectives(text)
    except ValueError as refused:
        assert str(refused).startswith("slo: ")


@settings(max_examples=40, deadline=None)
@given(case=crowded(), objectives=st.lists(OF_REQUESTS, min_size=1, max_size=4, unique_by=lambda one: one.name))
def test_met_means_that_so_many_requests_keep_the_bound(case, objectives) -> None:
    run = simulate(case[0], MODEL, DEVICE, "balanced", case[1])
    log, late = run.requests, np.inf
    times = {"ttft": log.ttft_s, "tpot": log.tpot_s, "e2e": log.finish_s - log.arrival_s, "queue": log.queue_s}
    for one, outcome in zip(objectives, evaluate(objectives, log)):
        values = np.where(log.rejected == 0, times[one.metric], late)
        values = values[~np.isnan(values)]
        # Linear percentiles lie between two requests: the share that keeps a kept bound lacks less than one request.
        kept = np.count_nonzero(values <= one.bound_s)
        if outcome.met:
            assert kept > one.percentile / 100 * (len(values) - 1) - 1e-9 or not len(values)
        else:
            assert kept < one.percentile / 100 * (len(values) - 1) + 1
        assert (outcome.value_s is None) <= bool((log.rejected != 0).any())
    good = goodput(objectives, run)
    kept = [
        log.rejected[i] == 0 and all(
            np.isnan(times[one.metric][i]) or
            times[one.metric][i] <= max(other.bound_s for other in objectives if other.metric == one.metric)
            for one in objectives
        )
        for i in range(len(log.rejected))
    ]
    assert good.requests == sum(kept) and good.request_share == sum(kept) / len(kept)
    assert good.requests_per_s * run.summary["makespan_s"] == pytest.approx(sum(kept))
    assert good.tokens_per_s * run.summary["makespan_s"] == pytest.approx(log.output_tokens[np.array(kept)].sum())
    wider = [replace(one, bound_s=one.bound_s * 2) for one in objectives]
    assert goodput(wider, run).requests >= good.requests
    assert all(b.met or not a.met for a, b in zip(evaluate(objectives, log), evaluate(wider, log)))


def test_the_percentiles_are_the_summary_s() -> None:
    run = simulate(poisson_trace(60, 4, 900, 30, seed=1), MODEL, DEVICE, "balanced")
    objectives = parse_objectives("ttft_p50=1s,ttft_p99=1s,tpot_p90=1s,queue_p90=1s,itl_p50=1s,itl_p99=1s")
    for outcome in evaluate(objectives, run.requests, run.gaps):
        one = outcome.objective
        assert outcome.value_s == run.summary[f"{one.metric}_s"][f"p{one.percentile:g}"]
        assert outcome.to_dict() == {"value_s": outcome.value_s, "bound_s": 1, "met": True}
