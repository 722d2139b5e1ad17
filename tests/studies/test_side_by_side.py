"""Runs in threads: results in the order of the names, one report at a time, and none that goes on after a failure."""
from __future__ import annotations

import threading

import pytest
from serving_cases import DEVICE, MODEL, poisson_trace

from pkvsim.serving.simulate import simulate
from pkvsim.studies.side_by_side import side_by_side
from pkvsim.studies.whatif import whatif

NAMES = [f"run {at}" for at in range(8)]


def test_results_and_reports_are_named() -> None:
    told: list[tuple[str, int, int]] = []

    def run(name, report):
        report(1, 2)
        return name.upper()

    assert side_by_side(run, NAMES, lambda *report: told.append(report)) == {name: name.upper() for name in NAMES}
    assert list(side_by_side(run, NAMES)) == NAMES
    assert sorted(told) == [(name, 1, 2) for name in NAMES]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_failure_ends_the_others(order, monkeypatch) -> None:
    monkeypatch.setattr("pkvsim.studies.side_by_side._cores", lambda: 2)
    failed, begun, ended = threading.Event(), threading.Event(), []

    def run(name, report):
        if name == NAMES[1]:
            assert begun.wait(10)
            failed.set()
            raise ValueError("run 1: expected another")
        begun.set()
        assert failed.wait(10)
        try:
            while True:  # as a run that reports from time to time
                report(0, 1)
        finally:
            ended.append(name)

    with pytest.raises(ValueError, match="run 1: expected another"):
        side_by_side(run, [NAMES[at] for at in order])
    assert ended == [NAMES[2]]


def test_policies_in_threads_are_policies_one_by_one() -> None:
    trace, names = poisson_trace(60, 8, 700, 40, seed=3), ["paper", "calibrated", "balanced", "workqueue"]
    report = whatif(trace, MODEL, DEVICE, names)
    assert list(report.results) == names
    for name in names:
        assert report.results[name].summary == simulate(trace, MODEL, DEVICE, name).summary
