"""pkvsim step --select: the step over selected pages beside those that read all."""
import json
from dataclasses import asdict

import numpy as np
import pytest
from command import pkvsim
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.devices.device import DEVICES, get_device
from pkvsim.selection.rules import Budget
from pkvsim.selection.setup import SelectionSetup
from pkvsim.shapes import DecodeShape
from pkvsim.studies.explain_step import explain_step
from pkvsim.studies.selection.step import SELECTED, with_selection

SHAPE = DecodeShape(32, 8, 128, 16)


@given(
    lens=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 140_000)), min_size=1, max_size=24),
    device=st.sampled_from(sorted(DEVICES)), budget=st.floats(0.02, 1), every=st.integers(1, 4),
    layers=st.integers(1, 40), summary_dtype=st.sampled_from([None, "uint8"]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_parts_add_up_and_the_dense_routes_are_as_without(lens, device, budget, every, layers, summary_dtype) -> None:
    gpu, setup = get_device(device), SelectionSetup(budget=Budget(budget), every=every, summary_dtype=summary_dtype)
    dense = explain_step(SHAPE, np.array(lens, np.int32), gpu, routes=["balanced"], layers=layers)
    report = with_selection(dense, setup)
    route, found = report.routes[-1], report.selection
    assert report.routes[:-1] == dense.routes and route.route == SELECTED
    parts = asdict(route.split)
    assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(route.timeline_us)
    assert route.closed_us == pytest.approx(found.layer.selected_us) and route.step_us > layers * route.closed_us
    assert route.timeline_step_us >= max(layers * route.timeline_us, (layers - 1) * route.model.run_us) * (1 - 1e-9)
    assert parts["select_us"] == pytest.approx(found.layer.selected.keep + found.layer.selected.select)
    line = route.timeline
    assert line.bytes.sum() == found.listed_bytes <= dense.distinct_bytes
    assert found.scored_bytes == pytest.approx(found.summary_share * 4096 * 16 * sum(-(-n // 16) for n in lens))
    if len(line.start_us):
        assert line.start_us.min() >= parts["select_us"] and line.end_us.max() <= line.makespan_us + 1e-9
        tasks = line.schedule.tasks
        assert tasks["kv_head"].max() < 8 and tasks["row"].max() < len(lens)
    # What is taken is priced no slower than all pages, by the layer and by the step.
    assert report.taken == "balanced" or (
        found.layer.selected_us <= found.layer.dense_us and route.step_us < dense.routes[0].step_us)


@pytest.mark.parametrize(("lens", "taken"), [("32768x64", SELECTED), ("131072", SELECTED), ("4096", "balanced")])
def test_the_command_says_which_lengths_pay(capsys, monkeypatch, lens, taken) -> None:
    asked = ["step", "--seq-lens", lens, "--device", "h200", "--select", "mean_std:0.1", "--layers", "32"]
    code, out, _ = pkvsim(capsys, monkeypatch, *asked, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["taken"] == taken and report["selection"]["pays"] == (taken == SELECTED)
    assert report["selection"]["summary_share"] == 0.0625 and report["selection"]["prices"] == "fitted"
    _, shown, _ = pkvsim(capsys, monkeypatch, *asked)
    assert SELECTED in shown and "prices of selected pages" in shown and "it pays from" in shown


@pytest.mark.parametrize(("more", "words"), [
    (["--window", "4096"], "select: window: expected None"), (["--query-tokens", "2"], "select: query_tokens"),
    (["--kv-parallel", "2"], "kv_parallel: expected none with --select"),
    (["--shared", "4096x2"], "shared: expected none with --select"), (["--head-dim", "192"], "select: head_dim"),
    (["--select", "mean_std"], "select: expected METHOD:BUDGET"), (["--select-every", "0"], "select_every: "),
    (["--select", "off", "--select-every", "2"], "select_every: expected with --select alone"),
])  # fmt: skip
def test_what_is_not_served_is_refused_by_name(capsys, monkeypatch, more, words) -> None:
    asked = ["step", "--seq-lens", "8192x4", "--device", "h200"]
    asked += [] if "--select" in more else ["--select", "mean_std:0.1"]
    code, out, err = pkvsim(capsys, monkeypatch, *asked, *more)
    assert code and not out and words in " ".join(err.split())
