"""What no route serves, what no GPU holds, and what a reader must be told: each in its cell, none in silence."""
from __future__ import annotations

import json

import numpy as np
import pytest
from serving_cases import DEVICE, MODEL, make_trace, poisson_trace

from pkvsim import DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.devices.route_options import serving_routes, why_not
from pkvsim.models.presets import get_model
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.by_name import POLICIES, CalibratedPolicy, make_policy
from pkvsim.serving.costs import attention_costs, attention_kinds
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.studies.explain_step import explain_step
from pkvsim.studies.sweep import check_used, serving_sweep, step_sweep
from pkvsim.studies.whatif import whatif

GPT_OSS = get_model("gpt-oss-20b")  # sinks in all layers, a window in half of them
ONE = make_trace([(0, 1024, 128)])


@pytest.fixture
def sliding(tmp_path):
    """A model whose 32 layers all slide over 4,096 tokens."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return get_model(path)


@pytest.mark.parametrize("route", ["flashinfer_cuda_core", "balanced"])
def test_serving_prices_a_window_as_a_step_does(sliding, route) -> None:
    """The CUDA-core kernel walks all of a row: 19 ms for 32 rows of 15,200 tokens, not the window's 6."""
    trace = make_trace([(0, 15_199, 2)] * 32)
    config = ServingConfig(step_tokens=1 << 19, graphs=False)
    result = simulate(trace, sliding, DEVICE, route, config)
    options = AttentionOptions(window=4096)
    step = explain_step(sliding.shape(16), np.full(32, 15_200), DEVICE, routes=[route], layers=32, options=options)
    assert result.steps.attention_us[1] == pytest.approx(step.routes[0].step_us, rel=1e-9)
    assert (result.steps.attention_us[1] > 15_000) == (route == "flashinfer_cuda_core")


def test_sinks_and_odd_groups_go_to_no_kernel_that_lacks_them() -> None:
    for shape, options, _ in attention_kinds(GPT_OSS, 16):
        assert options.sinks and serving_routes(shape, options) == ("xqa", "split", "workqueue", "balanced")
    trace = make_trace([(0.1, 600, 20)] * 8)
    routes = simulate(trace, GPT_OSS, DEVICE, "calibrated").summary["routes"]
    assert routes and not any(name.startswith("flashinfer") for name in routes)
    report = whatif(trace, GPT_OSS, DEVICE, ["flashinfer", "balanced", "paper"])
    assert list(report.results) == ["balanced"] and list(report.left_out) == ["flashinfer", "paper"]
    assert "it does not serve" in report.left_out["flashinfer"] and any("left out" in note for note in report.notes)
    seven = get_model("qwen2.5-7b")
    assert seven.num_q_heads // seven.num_kv_heads == 7
    assert "group size 7" in why_not("flashinfer_cuda_core", seven.shape(16), PLAIN)
    with pytest.raises(ValueError, match="policies: flashinfer_cuda_core: expected a route that serves"):
        attention_costs(seven, DEVICE, "flashinfer_cuda_core", ServingConfig())


def test_a_step_that_no_route_serves_is_refused() -> None:
    for shape in (DecodeShape(32, 8, 80, 16), DecodeShape(32, 8, 80, 1024)):
        with pytest.raises(ValueError, match="head_dim 80 is not one of"):
            CalibratedPolicy().decide(shape, np.array([15_200], np.int32), DEVICE)
        with pytest.raises(ValueError, match="shape: expected one that a route of h200 serves; .*balanced: head_dim 80 is not one of"):
            explain_step(shape, [15_200], DEVICE)
    assert "page size 1024" in why_not("balanced", DecodeShape(32, 8, 128, 1024), PLAIN)
    one = CalibratedPolicy().decide(DecodeShape(32, 8, 128, 1), np.array([4096], np.int32), DEVICE)
    assert "xqa" not in one.prices and "balanced" in one.prices


@pytest.mark.parametrize("name", POLICIES)
def test_one_list_of_policies_for_steps_and_for_serving(name) -> None:
    if name != "paper":
        taken = make_policy(name).decide(MODEL.shape(16), np.full(4, 2001, np.int32), DEVICE, layers=32).route
        result = simulate(make_trace([(0, 2000, 2)] * 4), MODEL, DEVICE, name, ServingConfig(step_tokens=1 << 14))
        assert name == "oracle" or result.summary["routes"] == {taken: 1}
    assert attention_costs(MODEL, DEVICE, name, ServingConfig()).allowed.any()


def test_a_cell_is_priced_on_its_own() -> None:
    trace = poisson_trace(20, 2, 900, 30, seed=1)
    both = serving_sweep({"device": ("rtx3060", "h200")}, trace, MODEL, DEVICE, "balanced")
    alone = serving_sweep({"device": ("h200",)}, trace, MODEL, DEVICE, "balanced")
    assert both.values("tpot_s.p50")[1] == alone.values("tpot_s.p50")[0]
    narrowed = [note for note in both.notes if "4 bits" in note]
    assert len(narrowed) == 1 and "(device=rtx3060)" in narrowed[0]


def test_a_cell_that_cannot_be_is_empty_with_its_reason() -> None:
    big = get_model("qwen3-30b-a3b")
    sweep = serving_sweep({"device": ("h200", "rtx3060")}, ONE, big, DEVICE, "balanced")
    assert np.isnan(sweep.values("tokens_per_s")).tolist() == [False, True]
    cells = sweep.to_dict()["cells"]
    assert cells[1]["result"] is None and "does not fit rtx3060" in cells[1]["reason"]
    assert any("empty: " in note and "rtx3060" in note for note in sweep.notes)
    long = make_trace([(0, 60_000, 128)])
    sweep = serving_sweep({"device": ("rtx3060", "h200")}, long, MODEL, DEVICE, "balanced")
    assert np.isnan(sweep.values("tokens_per_s")).tolist() == [True, False]
    sweep = serving_sweep({"device": ("rtx3060", "h200")}, ONE, MODEL, DEVICE, "xqa")
    assert np.isnan(sweep.values("tokens_per_s")).tolist() == [True, False]
    steps = step_sweep({"policy": ("balanced", "xqa"), "length": (64, 128)}, MODEL.shape(1), DEVICE)
    assert np.isnan(steps.values("us")).tolist() == [[False] * 2, [True] * 2]
    with pytest.raises(ValueError, match="does not fit rtx3060"):
        serving_sweep({"device": ("rtx3060",)}, ONE, big, DEVICE, "balanced")


def test_sweeps_warn_as_whatif_does_and_ignore_nothing() -> None:
    trace = make_trace([(0, 500, 10)] * 30 + [(0, MODEL.max_context, 1)])
    sweep = serving_sweep({"max_batch": (1, 64)}, trace, MODEL, DEVICE, "balanced")
    text = "\n".join(sweep.notes)
    assert "1 requests rejected, longer than the model's context" in text and "saturated" in text
    for given, has_trace in ({"prefix_cache": True}, False), ({"layers": True}, True):
        with pytest.raises(ValueError, match=f"{next(iter(given))}: means something"):
            check_used(has_trace, **given)
    check_used(True, limit=True, layers=False)


def test_requests_that_come_faster_than_they_are_served_saturate() -> None:
    burst = make_trace([(0, 4000, 20)] * 40)
    assert simulate(burst, MODEL, DEVICE, "balanced").summary["saturated"]
    l4 = get_device("l4")
    crowd = poisson_trace(300, 3, 2000, 150, seed=2)  # three times what the GPU serves
    run = simulate(crowd, MODEL, l4, "balanced")
    assert run.summary["queue_s"]["p50"] > 10 and run.summary["saturated"]
    assert not simulate(make_trace([(5, 500, 10)] * 12), MODEL, DEVICE, "balanced").summary["saturated"]


def test_what_figures_stand_on_is_said() -> None:
    report = whatif(poisson_trace(20, 5, 600, 20, seed=0), MODEL, DEVICE, ["balanced"])
    rows = {row.quantity: row for row in report.basis}
    attention = rows["decode attention, balanced"]
    assert attention.basis == "fitted" and attention.error_percent < 5 and 0 < attention.time_share < 1
    assert rows["matrix products"].basis == "fitted" and rows["matrix products"].band_percent > 0
    shares = [row.time_share for row in report.basis if row.time_share is not None]
    assert sum(shares) == pytest.approx(1)
    assert json.loads(json.dumps(report.to_dict()))["basis"][0]["basis"] == "fitted"
    estimated = whatif(ONE, MODEL, get_device("l4"), ["balanced"])
    assert estimated.basis[0].basis == "estimated"
