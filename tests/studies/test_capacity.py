"""Capacity: the bracket, what a search promises of each server, ranking and prices, and the command."""
from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from command import azure_trace, pkvsim
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving_cases import make_trace, poisson_trace

from pkvsim.devices.device import get_device
from pkvsim.models.presets import get_model
from pkvsim.serving.fit_model import fit_model
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.studies.capacity.bisection import highest_kept
from pkvsim.studies.capacity.expected_edge import expected_edge
from pkvsim.studies.capacity.result import RANKS, CapacitySearch
from pkvsim.studies.capacity.search import capacity_search, replicas_for
from pkvsim.studies.objectives import evaluate, parse_objectives
from pkvsim.studies.sweep import serving_sweep
from pkvsim.studies.workers import Workers
from pkvsim.traces.requests import at_rate

TRACE = poisson_trace(60, 4, 900, 30, seed=3)
OBJECTIVES = parse_objectives("ttft_p90=3s,tpot_p90=150ms")
AXES = {"device": ("l4", "h200"), "tp": (1, 3, 2)}
PRICES = {"l4": 0.8, "h200": 3.5}


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.floats(1e-3, 1))
def test_the_bracket_of_a_monotone_server(edge, start, tolerance) -> None:
    asked: list[float] = []

    def keeps(rate: float) -> bool:
        asked.append(rate)
        return rate <= edge

    bracket = highest_kept(keeps, start, tolerance)
    assert len(asked) == len(set(asked)) < 40
    if bracket.kept is None:
        assert bracket.missed == min(asked) and not any(rate <= edge for rate in asked)
    elif bracket.missed is None:
        assert bracket.kept == max(asked) <= edge
    else:
        assert bracket.kept <= edge < bracket.missed <= bracket.kept * (1 + tolerance)


@given(st.integers(0, 2**32), st.floats(1e-3, 1))
def test_the_bracket_of_any_server_has_an_edge_of_it(seed, tolerance) -> None:
    answers: dict[float, bool] = {}
    rng = np.random.default_rng(seed)
    bracket = highest_kept(lambda rate: answers.setdefault(rate, bool(rng.integers(2))), 1.0, tolerance)
    assert bracket.kept is None or answers[bracket.kept]
    assert bracket.missed is None or not answers[bracket.missed]
    if bracket.kept and bracket.missed:
        assert bracket.kept < bracket.missed <= bracket.kept * (1 + tolerance)


@example(1.25, 2**-9, False, 0)  # a rate that is tried on the way is the edge
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1), st.booleans(), st.integers(0, 2**32))
def test_what_is_expected_of_the_edge_changes_how_it_is_found_alone(edge, tolerance, near, seed) -> None:
    rng = np.random.default_rng(seed)
    for wrong, most in ((0.0, 12), (0.04 * math.log1p(tolerance), 12), (9.0, 80)):
        asked: list[float] = []

        def keeps(rate: float) -> bool:
            asked.append(rate)
            return rate <= edge

        def expect(kept, missed):
            return None if wrong == 9 and rng.random() < 0.3 else edge * float(np.exp(rng.uniform(-wrong, wrong)))

        bracket = highest_kept(keeps, 1.0, tolerance, edge=expect, near=expect(None, None) if near else None)
        assert len(asked) == len(set(asked)) <= most
        assert bracket.kept <= edge < bracket.missed <= bracket.kept * (1 + tolerance)
        assert not near or wrong == 9 or len(asked) == 2


@given(st.floats(0.5, 4), st.floats(-8, 8), st.floats(-1, 1), st.integers(0, 99))
def test_the_edge_of_a_power_law_is_known(power, at, off, seed) -> None:
    """From two rates beside it; and from one, and another trace's curve."""
    rates = np.exp(np.random.default_rng(seed).uniform(-12, 12, 5))
    edge = math.exp(at)
    tried = {float(rate): power * math.log(rate / edge) for rate in rates}
    kept = max((rate for rate in tried if tried[rate] < 0), default=None)
    missed = min((rate for rate in tried if tried[rate] > 0), default=None)
    found = expected_edge(tried, kept, missed)
    assert found is None if kept is None or missed is None else found == pytest.approx(edge)
    guide = {float(rate): power * math.log(rate / edge) - off for rate in np.exp(np.linspace(-16, 16, 9))}
    for ends in ((kept, None), (None, missed)):
        found = expected_edge(tried, *ends, guide)
        assert found is None if ends == (None, None) else found == pytest.approx(edge)


def test_long_traces_are_searched_by_their_first_requests_first() -> None:
    """With the result of a search that halves: the same edge within the tolerance, in fewer runs of the whole trace."""
    trace = poisson_trace(4000, 8, 300, 4, seed=3)
    objectives = parse_objectives("ttft_p90=80ms")
    (cell,) = capacity_search({"batch": (16,)}, trace, objectives, device="h200", policy="balanced").cells
    model, _ = fit_model(get_model("llama-3.1-8b"), get_device("h200"), ServingConfig(max_batch=16))

    def keeps(rate: float) -> bool:
        run = simulate(at_rate(trace, rate), model, get_device("h200"), "balanced", ServingConfig(max_batch=16))
        return evaluate(objectives, run.requests)[0].met and not run.summary["saturated"]

    assert len(cell.points) <= 6
    assert keeps(cell.capacity.rate_per_s) and not keeps(cell.capacity.missed_rate_per_s)
    assert cell.capacity.missed_rate_per_s <= cell.capacity.rate_per_s * 1.02


@given(st.floats(1e-6, 1e6), st.integers(1, 1000))
def test_replicas(rate, count) -> None:
    assert replicas_for(rate * count, rate) == count  # a whole number of times the rate needs no further replica
    assert replicas_for(rate * (count + 0.5), rate) == count + 1


@pytest.fixture(scope="module")
def search() -> CapacitySearch:
    return capacity_search(AXES, TRACE, OBJECTIVES, prices=PRICES, curve=True)


def test_every_server_keeps_its_rate_and_misses_the_next(search) -> None:
    assert len(search.cells) == 6
    for cell in search.cells:
        one = cell.capacity
        if cell.place["tp"] == 3:
            assert one is None and "divisor of llama-3.1-8b's 32 query heads" in cell.reason
            continue
        gpu = get_device(cell.device)
        model, _ = fit_model(get_model("llama-3.1-8b", tensor_parallel=cell.place["tp"]), gpu, ServingConfig())
        assert one is not None and one.rate_per_s < one.missed_rate_per_s <= one.rate_per_s * (1 + search.tolerance)
        for rate, kept in ((one.rate_per_s, True), (one.missed_rate_per_s, False)):
            run = simulate(at_rate(TRACE, rate), model, gpu, "calibrated")
            outcomes = evaluate(OBJECTIVES, run.requests)
            assert kept == (all(outcome.met for outcome in outcomes) and not run.summary["saturated"])
            if kept:
                assert run.summary == one.summary and outcomes == one.outcomes
            else:
                names = {outcome.objective.name for outcome in outcomes if not outcome.met}
                assert set(one.missed) - {"saturated"} == names and one.missed
        assert one.output_tokens_per_s == pytest.approx(one.rate_per_s * 30)
        assert one.prompt_tokens_per_s == pytest.approx(one.rate_per_s * 900)
        hourly = PRICES[cell.device] * cell.place["tp"]
        assert one.dollars_per_hour == hourly
        assert one.dollars_per_million_tokens == pytest.approx(hourly / (one.rate_per_s * 930 * 3600 / 1e6))
        rates = [point.rate_per_s for point in cell.points]
        assert rates == sorted(rates) and len(rates) == len(set(rates))
        assert {one.rate_per_s * share for share in (0.25, 0.5)} <= set(rates)
        assert {row.quantity for row in cell.basis} >= {"prefill attention", "memory bandwidth"}
    assert any(note.startswith("empty: tensor_parallel") for note in search.notes)


def test_ranks(search) -> None:
    keys = {
        "dollars": lambda one: one.dollars_per_million_tokens, "rate": lambda one: -one.rate_per_s,
        "rate_per_gpu": lambda one: -one.rate_per_s / one.gpus_per_replica, "gpus": lambda one: one.gpus,
    }  # fmt: skip
    assert search.rank == "dollars"
    for rank in RANKS:
        again = search if rank == "dollars" else capacity_search(
            AXES, TRACE, OBJECTIVES, rank=rank, tolerance=0.5, wanted_rate_per_s=50 if rank == "gpus" else None
        )
        found = [cell.capacity for cell in again.cells]
        assert found[4:] == [None, None]
        values = [keys[rank](one) for one in found[:4]]
        assert values == sorted(values)
        if rank == "gpus":
            for one in found[:4]:
                assert one.replicas == math.ceil(50 / one.rate_per_s) and one.gpus == one.replicas * one.gpus_per_replica


def test_workers_change_nothing() -> None:
    axes, told = {"device": ("l4", "h200")}, []
    here, there = (
        capacity_search(
            axes, TRACE, OBJECTIVES, tolerance=0.5, policy="balanced", workers=Workers(workers),
            progress=lambda done, total: told.append((done, total)),
        )
        for workers in (1, 2)
    )  # fmt: skip
    assert there.to_dict() == here.to_dict() and told == [(1, 2), (2, 2)] * 2


def test_a_trace_too_short_to_fill_the_server_is_said() -> None:
    tight = parse_objectives("ttft_p90=300ms")
    for requests, is_short in ((12, True), (1500, False)):
        found = capacity_search({"device": ("h200",)}, poisson_trace(requests, 1, 900, 30, seed=0), tight)
        assert any(note.startswith("too short a trace") for note in found.notes) == is_short


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([0.05, 0.5, 4]), st.sampled_from(["ttft_p50", "e2e_p99", "queue_p90"]), st.integers(1, 4))
def test_a_wider_bound_keeps_at_least_the_rate(bound_s, name, wider) -> None:
    rates = []
    for bound in (bound_s, bound_s * wider):
        found = capacity_search(
            {"batch": (8,)}, TRACE, parse_objectives(f"{name}={bound}s"), device="h200", policy="balanced",
            tolerance=0.05,
        )  # fmt: skip
        one = found.cells[0].capacity
        rates.append(0.0 if one is None else one.rate_per_s)
    assert rates[1] >= rates[0] / 1.05


def test_what_no_rate_keeps_has_its_reason() -> None:
    found = capacity_search({"device": ("l4",)}, TRACE, parse_objectives("ttft_p50=1us"))
    (cell,) = found.cells
    assert cell.capacity is None and cell.points and cell.basis
    assert "requests/s ttft_p50 is" in cell.reason and f"empty: {cell.reason}" in found.notes
    rejected = make_trace([(1, 10**6, 4), (1, 10, 4)])
    (cell,) = capacity_search({"device": ("l4",)}, rejected, parse_objectives("ttft_p99=10s")).cells
    assert "cannot be met: 50.0% of the requests are rejected" in cell.reason


def test_batches_of_a_sweep_or_a_search_have_room_for_their_drafts() -> None:
    """As whatif makes room for those of --max-batch."""
    config = ServingConfig(query_tokens=4, acceptance=0.5)
    trace = make_trace([(0.5, 500, 10)] * 12)
    sweep = serving_sweep({"max_batch": (8, 1024)}, trace, get_model("llama-3.1-8b"), get_device("h200"), "balanced", config)
    assert sweep.values("finished").tolist() == [12, 12]
    search = capacity_search(
        {"batch": (8, 1024)}, trace, parse_objectives("ttft_p90=5s"), device="h200", policy="balanced", config=config,
        tolerance=0.5,
    )  # fmt: skip
    assert all(cell.capacity is not None for cell in search.cells)


@pytest.mark.parametrize(("options", "message"), [
    ({"prices": {"a10": 1.0}}, "price: expected a device of the search (h200, l4), got 'a10'"),
    ({"rank": "dollars"}, "rank: expected"), ({"rank": "best"}, "rank: expected"),
    ({"tolerance": 0}, "tolerance: expected"), ({"wanted_rate_per_s": -1}, "rate: expected"),
    ({"policy": "none"}, "polic"), ({"model": "none"}, "model: expected one of"),
    ({"axes": {"device": ("l4", "none")}}, "device: expected one of"), ({"axes": {"tp": (3,)}}, "tensor_parallel"),
    ({"axes": {"rate": (3,)}}, "axes: expected values for names of"), ({"objectives": ()}, "slo: expected"),
    ({"trace": make_trace([(0, 10, 1)] * 3)}, "expected requests spread over time"),
])  # fmt: skip
def test_what_cannot_be_is_refused_first(options, message) -> None:
    axes, trace, objectives = (options.pop(name, given) for name, given in (
        ("axes", {"device": ("l4", "h200")}), ("trace", TRACE), ("objectives", OBJECTIVES)))  # fmt: skip
    with pytest.raises(ValueError) as refused:
        capacity_search(axes, trace, objectives, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_command(capsys, monkeypatch, tmp_path) -> None:
    (tmp_path / "azure.csv").write_text(azure_trace(20))
    monkeypatch.chdir(tmp_path)
    args = ("capacity", "--trace", "azure.csv", "--slo", "ttft_p90=2s,e2e_p99=9s", "--over", "device=l4,h200", "--over",
            "tp=1,3", "--price", "l4=0.8", "--price", "h200=$3.5", "--tolerance", "0.1")  # fmt: skip
    code, out, err = pkvsim(capsys, monkeypatch, *args, "--rate", "900", "--json", "--csv", "out.csv")
    assert (code, err) == (0, "")
    told = json.loads(out)
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(told["cells"]) == 4
    for row, cell in zip(rows, told["cells"]):
        assert (row["device"], int(row["tp"])) == (cell["device"], cell["tp"])
        if cell["result"] is None:
            assert row["reason"] == cell["reason"] and row["rank"] == row["rate_per_s"] == ""
        else:
            assert float(row["rate_per_s"]) == cell["result"]["rate_per_s"]
            assert float(row["e2e_p99_s"]) == cell["result"]["objectives"]["e2e_p99"]["value_s"]
            assert int(row["replicas"]) == cell["result"]["replicas"] > 1
    code, out, err = pkvsim(capsys, monkeypatch, *args)
    assert (code, err) == (0, "") and "cheapest million tokens first" in out and "empty: tensor_parallel" in out
    made = ("capacity", "--input-tokens", "500", "--output-tokens", "20", "--requests", "30", "--slo", "ttft_p90=1s",
            "--over", "batch=4", "--device", "h200", "--tolerance", "0.5", "--json")  # fmt: skip
    code, out, err = pkvsim(capsys, monkeypatch, *made)
    assert (code, err) == (0, "") and json.loads(out)["trace"]["requests"] == 30
    for option, value, message in (
        ("--slo", "ttft=1", "slo: expected METRIC_pNN=TIME"), ("--price", "l4", "price: expected DEVICE=DOLLARS"),
        ("--price", "l4=1,l4=2", "price: expected each device once"), ("--csv", "x.txt", "csv: expected a file ending"),
        ("--report", "x.txt", "report: expected a file ending"), ("--over", "what=1", "over: expected NAME=VALUE"),
        ("--workers", "0", "workers: expected"),
    ):
        code, out, err = pkvsim(capsys, monkeypatch, *args, option, value)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
