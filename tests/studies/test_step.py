"""pkvsim step: where a step's time goes, and what the command prints and refuses."""
from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from command import pkvsim
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DEVICES, get_device
from pkvsim.devices.route_model import ROUTES
from pkvsim.devices.route_options import as_read, serving_routes
from pkvsim.options import AttentionOptions
from pkvsim.policy.by_name import make_policy
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.shapes import DecodeShape
from pkvsim.studies.explain_step import explain_step, parse_seq_lens
from pkvsim.timeline.timeline import simulate

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
ROUTE_KEYS = [
    "status", "closed_us", "timeline_us", "step_us", "timeline_step_us", "host_us", "launches", "splits", "tasks",
    "ctas", "slots", "used_slots", "busy_share", "longest_task", "cta_gb_s", "shared_gb_s", "bound", "why", "shared_reads", "time_us",
]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    seq_lens=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 90_000)), max_size=40),
    device=st.sampled_from(sorted(DEVICES)),
    kv_heads=st.sampled_from([1, 2, 8, 32]),
    layers=st.integers(1, 80),
    splits=st.sampled_from([None, None, 1, 7, 64]),
    options=st.builds(
        AttentionOptions, window=st.sampled_from([None, None, 1, 5000]), query_tokens=st.sampled_from([1, 1, 8])
    ),
)
def test_the_parts_of_the_time_add_up(seq_lens, device, kv_heads, layers, splits, options) -> None:
    shape, gpu = DecodeShape(32, kv_heads, 128, 16), get_device(device)
    report = explain_step(shape, np.array(seq_lens, np.int32), gpu, layers=layers, splits=splits, options=options)
    models = [name for name in ROUTES if name in device_routes(gpu)]
    assert [route.route for route in report.routes] == list(serving_routes(shape, options, tuple(models)))
    for route in report.routes:
        parts = asdict(route.split)
        assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(route.timeline_us, rel=1e-9, abs=1e-9)
        assert parts[f"{route.split.bound}_us"] == max(parts.values())
        pinned = splits if route.route in ("split", "workqueue") else None
        read = as_read(route.route, options)
        line = simulate(route.model, shape, report.seq_lens, num_sms=gpu.num_sms, splits=pinned, options=read)
        assert line.makespan_us == route.timeline_us
        assert 0 <= route.busy_share <= 1 + 1e-9 and route.used_slots <= line.num_slots
        assert route.longest_task_us() == pytest.approx((line.end_us - line.start_us).max(initial=0.0))
        assert (route.longest_task is None) == (not sum(seq_lens)) and route.why()
        read_us = line.bytes.sum() / (line.shared_gb_s * 1e3)  # no less than this is spent where reads are saturated...
        unsaturated = parts["cta_rate_us"] + parts["tail_us"]  # ...and where they are not
        assert read_us <= parts["bandwidth_us"] + parts["compute_us"] + unsaturated + 1e-6 * route.timeline_us
    decision, oracle = (
        make_policy(name, split_splits=splits, workqueue_splits=splits).decide(
            shape, report.seq_lens, gpu, layers=layers, available=tuple(models), options=options
        )
        for name in ("calibrated", "oracle")
    )
    assert report.taken == decision.route and report.reason == decision.reason
    for route in report.routes:
        assert route.step_us == decision.prices[route.route] and 0 <= route.host_us <= route.step_us
        assert route.step_us >= layers * route.closed_us * (1 - 1e-9)
        assert route.closed_us == decision.layer_us[route.route]
        assert route.timeline_step_us >= layers * route.timeline_us * (1 - 1e-9)
        assert route.timeline_step_us == oracle.prices[route.route]
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("lens", "route", "bound"),
    [
        ("65536x8", "balanced", "bandwidth"),
        ("65536x8", "flashinfer_cuda_core", "compute"),
        ("131072,16x63", "xqa", "tail"),
        ("16x1", "split", "launches"),
        ("16384x2", "workqueue", "cta_rate"),
        ("1,2,3,4,5,6,7,8,9,10", "split", "launches"),
    ],
)
def test_what_bounds_a_step(lens, route, bound) -> None:
    splits = 2 if bound == "cta_rate" else None  # 32 CTAs of an H200's 132
    report = explain_step(SHAPE, parse_seq_lens(lens), get_device("h200"), routes=[route], splits=splits)
    assert report.routes[0].split.bound == bound, report.routes[0].split


def test_lengths_of_text() -> None:
    assert parse_seq_lens("65536, 2048x3,0").tolist() == [65536, 2048, 2048, 2048, 0]


def test_json(capsys, monkeypatch) -> None:
    args = ("step", "--seq-lens", "65536,2048x15", "--device", "h200", "--layers", "32", "--json")
    code, out, err = pkvsim(capsys, monkeypatch, *args)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert list(report) == ["device", "shape", "seq_lens", "kv_bytes", "distinct_kv_bytes", "shared", "layers",
                            "options", "selection", "taken", "reason", "routes"]
    assert report["distinct_kv_bytes"] == report["kv_bytes"] and report["shared"] == []
    assert report["taken"] == min(report["routes"], key=lambda name: report["routes"][name]["step_us"])
    for route in report["routes"].values():
        assert list(route) == ROUTE_KEYS
        assert route["step_us"] >= 32 * route["closed_us"] + route["host_us"] - 1e-6
    assert pkvsim(capsys, monkeypatch, *args)[1] == out


def test_rows_that_share_pages(capsys, monkeypatch, tmp_path) -> None:
    words = ("--seq-lens", "8704x48,1000x4", "--shared", "8200x48", "--device", "h200", "--layers", "4")
    drawn = tmp_path / "step.svg", tmp_path / "step.json"
    code, out, err = pkvsim(capsys, monkeypatch, "step", *words, "--plot", str(drawn[0]), "--timeline", str(drawn[1]))
    assert (code, err) == (0, "")
    assert "1 group of rows with pages in common: balanced reads them 3 times a KV head for 48 rows" in out
    assert "150.6 MB distinct" in out
    assert all(path.exists() for path in drawn) and "16 rows head 0" in drawn[1].read_text()
    report = json.loads(pkvsim(capsys, monkeypatch, "step", *words, "--json")[1])
    apart = json.loads(pkvsim(capsys, monkeypatch, "step", *words[:2], *words[4:], "--json")[1])
    assert report["shared"] == [{"rows": list(range(48)), "prefix_tokens": 8192}]
    assert report["kv_bytes"] - report["distinct_kv_bytes"] == 47 * 8192 * 8 * 2 * 128 * 2
    balanced, others = report["routes"].pop("balanced"), report["routes"].values()
    assert balanced["shared_reads"] == 3 and all(route["shared_reads"] == 0 for route in others)
    assert report["taken"] == "balanced" and balanced["step_us"] < min(route["step_us"] for route in others)
    for name, route in report["routes"].items():  # what rows share is found in L2
        assert route["closed_us"] <= apart["routes"][name]["closed_us"] + 1e-9
    assert sum(balanced["time_us"].values()) == pytest.approx(balanced["timeline_us"])
    for route in (balanced, *others):  # no memory reads faster than the GPU's peak
        words = "memory and L2 bandwidth" if route["shared_gb_s"] > DEVICES["h200"].peak_gb_s else "memory bandwidth"
        assert route["bound"] != "bandwidth" or route["why"].startswith(words)
    assert any("memory and L2" in route["why"] for route in others)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 40), prefix_pages=st.integers(1, 600), own=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    layers=st.integers(1, 80),
)  # fmt: skip
def test_a_step_with_shared_reads_is_issued_no_faster_than_any(rows, prefix_pages, own, layers) -> None:
    """Its layers take what step_times says of their kernels, by the closed form and by the timeline."""
    gpu = get_device("h200")
    lens = np.array([prefix_pages * 16 + own[row % len(own)] for row in range(rows)], np.int32)
    groups = PrefixGroups(np.zeros(rows, np.int32), [prefix_pages])
    report = explain_step(SHAPE, lens, gpu, layers=layers, groups=groups)
    (route,) = (route for route in report.routes if route.route == "balanced")
    model = route.model
    for layer_us, step_us in ((route.closed_us, route.step_us), (route.timeline_us, route.timeline_step_us)):
        further_us = (layers - 1) * max(layer_us, model.run_us)
        once_us = model.isolated_us + model.plan_us + rows * model.plan_row_us + model.host_us
        once_us += (len(set(lens.tolist())) - 1) * model.plan_length_us
        assert step_us == pytest.approx(once_us + layer_us + further_us, rel=1e-9)
    assert route.host_us == pytest.approx(route.step_us - model.isolated_us - layers * route.closed_us)
    assert report.taken == min(report.routes, key=lambda one: one.step_us).route


def test_tables(capsys, monkeypatch) -> None:
    code, out, err = pkvsim(capsys, monkeypatch, "step", "--seq-lens", "65536,2048x15", "--routes", "balanced,split")
    assert (code, err) == (0, "") and "\x1b" not in out
    for text in ("RTX 3060", "16 rows of 96,256 tokens", "394.3 MB", "balanced: ", "split: ", "taken: ", "fit error"):
        assert text in out
    assert "workqueue" not in out and "65536,2048x15" in pkvsim(capsys, monkeypatch, "step", "--help")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seq-lens", "3,x"], "seq_lens: expected LENGTH or LENGTHxROWS, got 'x'"),
        (["--seq-lens", ""], "seq_lens: expected LENGTH or LENGTHxROWS, got ''"),
        (["--seq-lens", "-1"], "seq_lens: expected an integer in [0, 2147483647], got -1"),
        (["--seq-lens", "8x0"], "seq_lens: rows: expected an integer in [1, 65536], got 0"),
        (["--seq-lens", "8x65536,8"], "seq_lens: expected at most 65536 rows"),
        (["--seq-lens", "8", "--routes", "xqa"], "routes: expected some of flashinfer_cuda_core"),
        (["--seq-lens", "8", "--routes", ","], "got none"),
        (["--seq-lens", "64x4", "--shared", "64"], "shared: expected TOKENSxROWS, got '64'"),
        (["--seq-lens", "64x4", "--shared", "64x5"], "shared: expected at most the 4 rows of seq_lens, got 5"),
        (["--seq-lens", "64x4", "--shared", "32x2,65x2"], "shared: expected at most the 64 tokens of row 2, got 65"),
        (["--seq-lens", "64x4", "--shared", "0x2"], "shared: expected an integer in [1, 2147483647], got 0"),
        (["--seq-lens", "64x4", "--shared", "64x4", "--window", "9"], "window: expected None with shared pages"),
        (["--seq-lens", "8", "--splits", "0"], "splits: expected"),
        (["--seq-lens", "8", "--splits", str(10**20)], f"splits: expected an integer in [1, 2147483647], got {10**20}"),
        (["--seq-lens", "8", "--layers", "0"], "layers: expected"),
        (["--seq-lens", "8", "--layers", str(10**20)], f"layers: expected an integer in [1, 2147483647], got {10**20}"),
        (["--seq-lens", "8", "--window", "0"], "window: expected an integer in [1, 2147483647], got 0"),
        (["--seq-lens", "8", "--query-tokens", "2", "--routes", "flashinfer_cuda_core"],
         "(rtx3060, query_tokens), got flashinfer_cuda_core"),
        (["--seq-lens", "8", "--device", "b999"], "device: expected one of"),
        (["--seq-lens", "8", "--num-kv-heads", "5"], "num_q_heads: expected a multiple"),
        ([], "--seq-lens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, args, message) -> None:
    code, out, err = pkvsim(capsys, monkeypatch, "step", *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("pkvsim: error: ")
    assert message in err
