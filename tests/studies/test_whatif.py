"""pkvsim whatif and sweep: what they print, what they refuse, and the examples built on them."""
from __future__ import annotations

import json
import re
import runpy
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EXAMPLES
from serving_cases import DEVICE, GPT_OSS, MODEL, kv_gib, make_trace, poisson_trace

from pkvsim import cli
from pkvsim.models.presets import flops_per_token, weight_bytes
from pkvsim.models.weight_bits import with_weight_bits
from pkvsim.policy.by_name import POLICIES
from pkvsim.serving.costs import attention_costs, page_budget
from pkvsim.serving.server_config import ServingConfig
from pkvsim.studies.cells import parse_axes
from pkvsim.studies.sweep import Sweep, serving_sweep, step_sweep
from pkvsim.studies.whatif import whatif

SUMMARY_KEYS = [
    "requests", "finished", "rejected_too_long_for_pool", "rejected_too_long_for_model", "output_tokens", "makespan_s",
    "tokens_per_s", "requests_per_s", "busy_share", "ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s",
    "tokens_per_decode_row", "steps", "step_us", "mean_rows", "attention_share", "rest_share", "prefill_share",
    "part_shares", "attention_us_per_decode_step", "routes", "regret", "kv_pages", "kv_occupancy", "preemptions",
    "prefix_hit_share", "prefix_hit_tokens", "saturated", "shared_reads", "selection", "replicas",
    "timeline",
]  # fmt: skip


@pytest.fixture
def trace_file(tmp_path) -> str:
    path = tmp_path / "requests.csv"
    rows = "".join(f"2023-11-16 18:00:{at:02d}.0000000,{900 + 37 * at},{20 + at}\n" for at in range(40))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    return str(path)


def pkvsim(capsys, monkeypatch, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["pkvsim", *args])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, *capsys.readouterr()


def test_json(capsys, monkeypatch, trace_file) -> None:
    args = ("whatif", "--trace", trace_file, "--device", "h200", "--policies", "paper,calibrated,oracle", "--json")
    code, out, err = pkvsim(capsys, monkeypatch, *args)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert list(report) == [
        "trace", "model", "device", "accuracy", "config", "policies", "rejected", "notes", "left_out", "basis",
    ]  # fmt: skip
    assert list(report["policies"]) == ["paper", "calibrated", "oracle"]
    for summary in report["policies"].values():
        assert list(summary) == SUMMARY_KEYS
        assert summary["finished"] == 40 and summary["output_tokens"] == sum(20 + at for at in range(40))
        assert summary["attention_share"] + summary["rest_share"] + summary["prefill_share"] == pytest.approx(1)
        assert sum(summary["part_shares"].values()) == pytest.approx(1)
        assert summary["timeline"]["steps"] > 0 and summary["timeline"]["regret"] >= 0
    assert report["policies"]["calibrated"]["regret"] == 0 <= report["policies"]["paper"]["regret"]
    assert pkvsim(capsys, monkeypatch, *args)[1] == out


def test_table_says_how_far_to_trust_it(capsys, monkeypatch, trace_file) -> None:
    code, out, err = pkvsim(capsys, monkeypatch, "whatif", "--trace", trace_file, "--device", "l4", "--limit", "10")
    assert (code, err) == (0, "")
    for text in ("tokens/s", "TTFT p99", "TPOT p50", "regret", "saturated", "first 10 of 40", "datasheet only"):
        assert text in out
    assert "\x1b" not in out  # nothing for a terminal in a pipe


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "llama-3.1-70b-tp4", "--weight-bits", "16"], "model: llama-3.1-70b-tp4 does not fit rtx3060"),
        (["--model", "llama-3.1-8b", "--weight-bits", "16"], "15.0 GiB of weights"),
        (["--kv-gib", "40"], "kv_gib: expected at most"),
        (["--kv-gib", "0.0001"], "kv_gib: expected at least one page"),
        (["--kv-gib", "0.004"], "requests: expected a request that fits the KV pool of 32 tokens"),
        (["--kv-gib", "nan"], "kv_gib: expected a number > 0, got nan"),
        (["--weight-bits", "3"], "weight_bits: expected one of 16, 8, 4, got 3"),
        (["--policies", "best"], "policies: expected names of paper, calibrated"),
        (["--policies", ","], "policies: expected at least one"),
        (["--policies", "paper,paper"], "policies: expected each once"),
        (["--prefix-cache", "fifo"], "prefix_cache: expected one of none, lru, infinite, belady, got 'fifo'"),
        (["--prefix-cache", "lru"], "prefix_cache: lru needs a trace with block hashes"),
        (["--max-batch", "0"], "max_batch: expected"),
        (["--step-tokens", "100"], "step_tokens: expected"),
        (["--page-size", "0"], "page_size: expected"),
        (["--rate-scale", "0"], "rate_scale: expected"),
        (["--limit", "0"], "limit: expected"),
        (["--memory-fraction", "1.5"], "memory_fraction: expected"),
        (["--device", "gtx1080"], "device: expected one of"),
        (["--model", "gpt-2"], "model: expected one of"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, trace_file, args, message) -> None:
    code, out, err = pkvsim(capsys, monkeypatch, "whatif", "--trace", trace_file, "--device", "rtx3060", *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("pkvsim: error: ")
    assert message in err


def test_a_model_too_large_is_narrowed_aloud(capsys, monkeypatch, trace_file) -> None:
    args = ("whatif", "--trace", trace_file, "--policies", "balanced", "--limit", "3")
    assert "rtx3060 as it comes: layer weights in 4 bits" in pkvsim(capsys, monkeypatch, *args)[1]
    assert "bits" not in pkvsim(capsys, monkeypatch, *args, "--device", "h200")[1]


def test_weight_bits() -> None:
    narrow = with_weight_bits(MODEL, 4)
    layers = sum(layer.attention_weights.bytes + layer.mlp.bytes for layer in MODEL.layers)
    assert weight_bytes(MODEL) - weight_bytes(narrow) == pytest.approx(layers * (1 - (4 + 20 / 128) / 16), rel=1e-3)
    assert flops_per_token(narrow) == flops_per_token(MODEL) and with_weight_bits(MODEL, 16) is MODEL
    assert weight_bytes(with_weight_bits(GPT_OSS, 8)) < weight_bytes(GPT_OSS)  # MXFP4 experts never widen
    assert with_weight_bits(GPT_OSS, 8).layers[0].expert == GPT_OSS.layers[0].expert


def test_pages_are_what_weights_and_workspace_leave() -> None:
    pages = page_budget(MODEL, DEVICE, ServingConfig())
    used = pages * 16 * 131072 + weight_bytes(MODEL) + 2**30
    assert used <= 0.9 * DEVICE.memory_gib * 2**30 < used + 16 * 131072
    assert page_budget(MODEL, DEVICE, ServingConfig(kv_gib=kv_gib(7))) == 7


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 70000), min_size=1, max_size=20),
    st.sampled_from([(8, 4), (4, 4), (2, 4), (8, 1), (1, 4)]),
)
def test_the_compiled_paper_policy_decides_as_the_paper_policy(lens, heads) -> None:
    from pkvsim.policy.paper import PAPER_ROUTES, PaperPolicy
    from pkvsim.policy.paper_rules import paper_choice
    from pkvsim.shapes import DecodeShape

    num_kv_heads, group_size = heads
    shape = DecodeShape(num_kv_heads * group_size, num_kv_heads, 128, 16)
    ordered = np.sort(np.array(lens))[::-1].copy()
    rules = attention_costs(MODEL, DEVICE, "paper", ServingConfig()).paper
    choice, splits = paper_choice(ordered, num_kv_heads, group_size, 128, 2, DEVICE.num_sms, rules)
    decision = PaperPolicy().decide(shape, ordered, DEVICE)
    assert PAPER_ROUTES[choice] == decision.route
    if decision.splits is not None:
        assert splits == np.minimum(decision.splits, -(-ordered // 32)).max()


def test_no_policy_beats_the_oracle_step_by_step() -> None:
    trace = poisson_trace(60, 5, 6000, 40, seed=1)
    report = whatif(trace, MODEL, DEVICE, POLICIES)
    best = report.results["oracle"]
    for name, result in report.results.items():
        assert (result.steps.attention_us >= result.steps.best_attention_us * (1 - 1e-12)).all(), name
        assert result.summary["finished"] == 60
        assert result.summary["makespan_s"] >= best.summary["makespan_s"] * 0.99, name


def test_sweeps_hold_every_cell_once(capsys, monkeypatch, trace_file) -> None:
    trace = make_trace([(0.5, 800, 20)] * 20)
    sweep = serving_sweep({"rate": (1, 4), "page_size": (16, 32, 64)}, trace, MODEL, DEVICE, "balanced")
    assert sweep.values("finished").tolist() == [[20] * 3] * 2
    assert (sweep.values("tokens_per_s")[1] > sweep.values("tokens_per_s")[0]).all()
    places = [(cell["rate"], cell["page_size"]) for cell in sweep.to_dict()["cells"]]
    assert places == [(rate, size) for rate in (1, 4) for size in (16, 32, 64)]
    code, out, err = pkvsim(
        capsys, monkeypatch, "sweep", "--trace", trace_file, "--device", "h200", "--over", "rate=1,2", "--over",
        "group-size=4,8", "--metric", "tpot_s.p50",
    )  # fmt: skip
    assert (code, err) == (0, "") and "tpot_s.p50 over rate and group_size" in out
    assert "attention prices of h200: fit error" in out
    with pytest.raises(ValueError, match="metric: expected a figure such as requests"):
        serving_sweep({"rate": (1, 2)}, trace, MODEL, DEVICE, "balanced", metric="tokens")


def test_step_sweep(capsys, monkeypatch) -> None:
    sweep = step_sweep({"batch": (1, 8), "length": (1024, 65536)}, MODEL.shape(16), DEVICE)
    us = sweep.values("us")
    assert (np.diff(us, axis=0) > 0).all() and (np.diff(us, axis=1) > 0).all()
    for cell in sweep.cells:
        assert cell["us"] == min(cell["routes_us"].values()) == cell["routes_us"][cell["route"]]
        assert cell["kv_gb_s"] < DEVICE.peak_gb_s
    args = ("sweep", "--device", "h200", "--over", "batch=1,8", "--over", "length=1024,65536")
    code, out, err = pkvsim(capsys, monkeypatch, *args, "--json")
    assert (code, err) == (0, "") and json.loads(out)["cells"][3]["result"] == sweep.cells[3]
    assert "us over batch and length" in pkvsim(capsys, monkeypatch, *args)[1]
    axes = {"batch": (1,), "length": (32768,), "splits": (1, 4, 16)}
    fixed = step_sweep(axes, MODEL.shape(16), DEVICE, "split").values("us")[0, 0]
    assert fixed[0] > fixed[1] > fixed[2]  # one row in one split is 8 CTAs on 132 SMs
    assert isinstance(sweep, Sweep) and sweep.values("routes_us.balanced").shape == (2, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--over", "batsh=1"], "over: expected NAME=VALUE,VALUE,... with a name of device, policy, batch"),
        (["--over", "batch"], "over: expected NAME=VALUE"),
        (["--over", "batch=1,x"], "over: batch: expected integers, got 'x'"),
        (["--over", "batch=1,0"], "over: batch: expected numbers > 0, got 0"),
        (["--over", "batch=1,1"], "over: batch: expected each value once"),
        (["--over", "batch=1", "--over", "batch=2"], "over: expected each name once"),
        (["--over", "device=rtx3060,gtx1080"], "device: expected one of"),
        (["--over", "group_size=5"], "group_size: expected a divisor of 32"),
        (["--over", "batch=1", "--metric", "tokens"], "metric: expected a figure such as batch"),
        (["--over", "rate=1,2"], "over: expected NAME=VALUE"),
        ([], "--over"),
    ],
)
def test_bad_sweeps_are_one_line_and_exit_code_2(capsys, monkeypatch, args, message) -> None:
    code, out, err = pkvsim(capsys, monkeypatch, "sweep", *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("pkvsim: error: ")
    assert message in err


def test_axes_of_text() -> None:
    assert parse_axes(["max-batch=8,16", "rate=0.5"], ("max_batch", "rate")) == {"max_batch": (8, 16), "rate": (0.5,)}


def test_the_tutorial_runs_as_it_stands(capsys) -> None:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (EXAMPLES / "tutorial_what_if.md").read_text(), re.DOTALL):
        exec(block, names)
    out = capsys.readouterr().out
    assert "300 requests" in out and "regret" in out and names["sweep"].values("saturated").shape == (3, 2)


def test_the_example_runs(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["what_if.py", "--requests", "60"])
    runpy.run_path(str(EXAMPLES / "what_if.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("made-up chat: 60 requests") == 3 and "prefix blocks hit" in out
