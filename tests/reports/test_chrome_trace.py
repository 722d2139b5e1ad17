"""Timelines in Chrome's trace format: well-formed, complete, and bounded with what is left out said."""
from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
from command import azure_trace, pkvsim
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, MODEL, crowded, poisson_trace

from pkvsim.devices.device import DEVICES, get_device
from pkvsim.reports.perfetto import serving_events, step_events, write_timeline
from pkvsim.shapes import DecodeShape
from pkvsim.studies.explain_step import explain_step, parse_seq_lens
from pkvsim.studies.whatif import whatif

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)


def ns(value: float) -> int:
    assert value * 1e3 == pytest.approx(round(value * 1e3), abs=0.2)  # whole nanoseconds
    return round(value * 1e3)


def check_well_formed(trace: dict) -> list[dict]:
    """Spans of a lane nest or follow each other, counters never go back in time, every lane and process has a name."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert list(trace) == ["traceEvents", "displayTimeUnit", "otherData"]
    lanes, counters, named = defaultdict(list), defaultdict(list), set()
    for event in trace["traceEvents"]:
        assert event["ph"] in "XCM" and isinstance(event["name"], str) and event["pid"] >= 1
        if event["ph"] == "M":
            named |= {(event["name"], event["pid"], event["tid"])}
            continue
        assert ns(event["ts"]) >= 0
        if event["ph"] == "C":
            assert event["args"] and all(np.isfinite(value) and value >= 0 for value in event["args"].values())
            counters[event["pid"], event["name"]].append(ns(event["ts"]))
        else:
            assert ns(event["dur"]) >= 0
            lanes[event["pid"], event["tid"]].append((ns(event["ts"]), -ns(event["dur"])))
    for times in counters.values():
        assert times == sorted(times)
    for (pid, tid), spans in lanes.items():
        assert {("thread_name", pid, tid), ("process_name", pid, 0)} <= named
        ends: list[int] = []
        for start, minus in sorted(spans):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or start - minus <= ends[-1], (pid, tid)
            ends.append(start - minus)
    return trace["traceEvents"]


def spans_of(events: list[dict], pid: int, tid=None) -> list[dict]:
    return [e for e in events if e["ph"] == "X" and e["pid"] == pid and (tid is None or e["tid"] == tid)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, 90_000)), max_size=24), st.sampled_from(sorted(DEVICES)),
    st.integers(1, 4000),
)  # fmt: skip
def test_every_task_of_a_step_is_one_event(seq_lens, device, max_events) -> None:
    report = explain_step(SHAPE, np.array(seq_lens, np.int32), get_device(device))
    events = check_well_formed(step_events(report))
    for pid, route in enumerate(report.routes, 1):
        line = route.timeline
        tasks = [event for event in spans_of(events, pid) if event["tid"] > 0]
        assert len(tasks) == len(line.schedule.tasks)
        assert sum(event["args"]["kv_bytes"] for event in tasks) == line.bytes.sum()
        assert {event["tid"] - 1 for event in tasks} == set(line.slot.tolist())
        assert spans_of(events, pid, 0)[0]["dur"] == pytest.approx(line.makespan_us, abs=1e-3)
        running = [e["args"]["tasks"] for e in events if e["ph"] == "C" and e["pid"] == pid]
        assert (running[-1:] or [0]) == [0] and bool(tasks) <= max(running, default=0) <= len(set(line.slot.tolist()))
    bounded = step_events(report, max_events=max_events)
    shown = [event for event in check_well_formed(bounded) if event["ph"] != "M"]
    assert len(shown) <= max_events + len(report.routes)
    whole = [event for event in events if event["ph"] == "X"]
    assert bool(bounded["otherData"]["left_out"]) == (len([e for e in shown if e["ph"] == "X"]) < len(whole))


@settings(max_examples=25, deadline=None)
@given(crowded(), st.integers(30, 3000))
def test_a_run_is_well_formed_and_bounded(case, max_events) -> None:
    trace, config = case
    report = whatif(trace, MODEL, DEVICE, ["calibrated", "paper"], config)
    whole = serving_events(report)
    events = check_well_formed(whole)
    for pid, result in enumerate(report.results.values(), 1):
        log = result.requests
        served = [event for event in spans_of(events, pid) if event["name"].startswith("request ")]
        assert len(served) == np.count_nonzero(~np.isnan(log.finish_s))
        for event in served:
            at = int(event["name"].removeprefix("request "))
            assert event["ts"] + event["dur"] == pytest.approx(log.finish_s[at] * 1e6, abs=2e-3)
            assert event["args"]["output_tokens"] == trace.output_tokens[at]
        steps = spans_of(events, pid, 1)
        assert sum(event["args"]["steps"] for event in steps) == result.summary["steps"]
        assert sum(event["dur"] for event in steps) == pytest.approx(result.totals["duration_us"], rel=1e-6, abs=0.1)
        pages = [e["args"]["pages"] for e in events if e["ph"] == "C" and e["pid"] == pid and "pages" in e["args"]]
        assert max(pages, default=0) <= result.num_pages and pages[-1:] in ([], [0])
    rejected = sum(len(ids) for ids in report.rejected().values())
    assert len(whole["otherData"]["left_out"]) == 2 * (rejected > 0)
    bounded = serving_events(report, max_events=max_events)
    shown = [event for event in check_well_formed(bounded) if event["ph"] != "M"]
    assert len(shown) <= max_events + 10 * len(report.results)  # at least a step, a request and the counters' ends each


def test_long_runs_say_what_they_leave_out() -> None:
    report = whatif(poisson_trace(300, 20, 500, 40, seed=2), MODEL, DEVICE, ["balanced"])
    bounded = serving_events(report, max_events=500)
    events = check_well_formed(bounded)
    steps, requests = bounded["otherData"]["left_out"]
    assert "balanced: single steps" in steps and "of 300 requests, one in 4 is kept" in requests
    assert len([event for event in events if event["name"].startswith("request ")]) == 75
    total = sum(event["args"]["steps"] for event in spans_of(events, 1, 1))
    assert total == report.results["balanced"].summary["steps"]


def test_files(capsys, monkeypatch, tmp_path) -> None:
    path = tmp_path / "step.json"
    args = ("step", "--seq-lens", "65536,2048x4", "--device", "h200", "--timeline", str(path))
    code, out, err = pkvsim(capsys, monkeypatch, *args)
    assert (code, err) == (0, "")
    report = explain_step(SHAPE, parse_seq_lens("65536,2048x4"), get_device("h200"))
    assert json.loads(path.read_text()) == step_events(report)
    code, out, err = pkvsim(capsys, monkeypatch, *args[:-1], str(tmp_path / "step.txt"))
    assert (code, out) == (2, "") and "timeline: expected a file ending in .json" in err
    code, out, err = pkvsim(capsys, monkeypatch, *args[:-1], str(tmp_path / "nowhere" / "step.json"))
    assert (code, out) == (2, "") and "timeline: cannot write" in err and err.count("\n") == 1
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="timeline: cannot write .*folder.json"):
        write_timeline(step_events(report), tmp_path / "folder.json")


def test_a_run_from_the_command_line(capsys, monkeypatch, tmp_path) -> None:
    trace, path = tmp_path / "requests.csv", tmp_path / "run.json"
    trace.write_text(azure_trace(20))
    args = ("whatif", "--trace", str(trace), "--device", "h200", "--policies", "balanced,split", "--json")
    code, out, err = pkvsim(capsys, monkeypatch, *args, "--timeline", str(path))
    assert (code, err) == (0, "") and pkvsim(capsys, monkeypatch, *args)[1] == out
    events = check_well_formed(json.loads(path.read_text()))
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"policy balanced", "policy split"}
