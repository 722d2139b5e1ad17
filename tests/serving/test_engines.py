"""Engines, caches of 8 bits, and models that no route of ours serves whole, in the serving loop."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from serving_cases import DEVICE, MODEL, kv_gib, make_trace, poisson_trace, steady

from pkvsim.models.presets import get_model
from pkvsim.outside.step import StepWork, step_time
from pkvsim.serving.costs import ENGINE, attention_costs, default_policies, page_budget
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.studies.sweep import IMPOSSIBLE, serving_sweep
from pkvsim.studies.whatif import whatif

CONFIGS = ROOT / "tests" / "models" / "configs"
TRACE = make_trace([(0.1, 600, 20)] * 10)


def test_an_engine_s_own_attention_beside_ours() -> None:
    config = ServingConfig(engine="vllm")
    assert default_policies(config) == (ENGINE,) and len(default_policies(ServingConfig())) == 6
    report = whatif(TRACE, MODEL, DEVICE, [ENGINE, "balanced"], config)
    own, ours = (report.results[name].summary for name in (ENGINE, "balanced"))
    assert own["routes"] == {} and own["regret"] is None and report.checks[ENGINE] is None
    assert ours["routes"] and own["attention_share"] > 0 and ours["finished"] == own["finished"] == 10
    assert report.basis[0].quantity == "decode attention, balanced"
    assert any("vllm's own kernel" in row.quantity for row in report.basis)
    assert report.to_dict()["config"]["workspace_gib"] == 1.17 and report.to_dict()["config"]["graphs"] is True
    with pytest.raises(ValueError, match="engine: expected an engine with attention of its own, got pkv"):
        simulate(TRACE, MODEL, DEVICE, ENGINE)
    with pytest.raises(ValueError, match="engine: expected one of pkv, vllm, sglang, trtllm, got 'tgi'"):
        ServingConfig(engine="tgi")


@pytest.mark.parametrize("rows", [1, 9])
def test_a_step_of_an_engine_is_what_step_time_says(rows) -> None:
    """Rows that all come at once, in one chunked step; then every step is of rows that decode, in a padded graph."""
    device, config = steady(DEVICE), ServingConfig(engine="vllm", step_tokens=16_384)
    run = simulate(make_trace([(0, 1000, 4)] * rows), MODEL, device, ENGINE, config)
    for at, length in ((1, 1001), (2, 1002), (3, 1003)):
        expected = step_time(MODEL, device, StepWork(decode_lens=(length,) * rows), config.profile)
        assert run.steps.duration_us[at] == pytest.approx(expected.us, rel=1e-9)
        assert run.steps.attention_us[at] == pytest.approx(expected.parts_us["decode_attention"], rel=1e-9)


def test_requests_lie_in_a_queue_before_the_scheduler_sees_them() -> None:
    device, config = steady(DEVICE), ServingConfig(engine="vllm")
    alone = simulate(make_trace([(0, 512, 2)]), MODEL, device, ENGINE, config).requests
    prefill = step_time(MODEL, device, StepWork(chunks=((0, 512),)), config.profile)
    assert alone.arrival_s[0] == 0
    assert alone.ttft_s[0] == pytest.approx(1.1e-3 + prefill.us / 1e6, rel=1e-9)
    closed = replace(make_trace([(0, 512, 2)] * 3), concurrency=1)
    log = simulate(closed, MODEL, device, ENGINE, config).requests
    np.testing.assert_allclose(log.arrival_s[1:], log.finish_s[:-1], rtol=1e-9)  # a client sends when it is answered


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 4))
def test_an_engine_that_keeps_room_for_whole_answers_admits_as_many_as_end_there(prompt, output, fit) -> None:
    """The last token of an answer is never cached."""
    pages = fit * -(-(prompt + output - 1) // 16)
    config = ServingConfig(engine="trtllm", kv_gib=kv_gib(pages), keep_free_fraction=0)
    assert config.profile.reserve_output == 1
    run = simulate(make_trace([(0, prompt, output)] * 6), MODEL, DEVICE, ENGINE, config)
    assert run.steps.rows.max() == fit and not run.requests.preemptions.any()
    assert (run.requests.output_tokens == output).all()


def test_a_cache_of_8_bits_holds_twice_the_tokens_and_is_read_faster() -> None:
    wide, narrow = ServingConfig(), ServingConfig(kv_dtype="float8_e4m3fn")
    assert page_budget(MODEL, DEVICE, narrow) == pytest.approx(2 * page_budget(MODEL, DEVICE, wide), abs=1)
    scaled = ServingConfig(kv_dtype="int8")
    assert page_budget(MODEL, DEVICE, wide) < page_budget(MODEL, DEVICE, scaled) < page_budget(MODEL, DEVICE, narrow)
    trace = make_trace([(0, 8000, 8)] * 16)
    for engine, policy in (("pkv", "balanced"), ("vllm", ENGINE)):
        times = [
            simulate(trace, MODEL, DEVICE, policy, ServingConfig(engine=engine, kv_dtype=dtype)).steps.attention_us[-1]
            for dtype in (None, "float8_e4m3fn")
        ]
        assert times[1] < 0.75 * times[0]
    with pytest.raises(ValueError, match="kv_dtype: expected None or one of"):
        ServingConfig(kv_dtype="fp4")


@pytest.mark.parametrize(
    ("name", "ranks", "routed"),
    [
        ("blis--deepseek-v2-lite", 1, 0), ("blis--llama-4-scout-17b-16e-instruct-fp8-dynamic", 4, 2),
        ("Qwen--Qwen3.5-27B", 1, 1), ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 1, 1),
    ],
)  # fmt: skip
def test_latent_chunked_and_state_layers_are_served(name, ranks, routed) -> None:
    """What no route serves costs what step_time says of it, beside what the routes do."""
    model, device = get_model(CONFIGS / f"{name}.json", tensor_parallel=ranks), steady(DEVICE)
    config = ServingConfig(step_tokens=4096)  # all prompts in one step
    assert len(attention_costs(model, device, "calibrated", config).layers) == routed
    run = simulate(make_trace([(0, 1000, 3)] * 4), model, device, "calibrated", config)
    rest = step_time(model, device, StepWork(decode_lens=(1002,) * 4), config.profile).parts_us["decode_attention"]
    if routed:
        assert run.steps.attention_us[-1] > rest
    else:
        assert run.steps.attention_us[-1] == pytest.approx(rest, rel=1e-9)
    assert (run.summary["part_shares"]["all_reduce"] > 0) == (ranks > 1)
    report = whatif(make_trace([(0, 100, 3)]), model, device, ["calibrated"], config)
    assert any("no route serves" in row.quantity for row in report.basis) == (name != "blis--llama-4-scout-17b-16e-"
                                                                             "instruct-fp8-dynamic")
    assert set(model.notes) <= set(report.notes)


def test_chunked_layers_read_their_chunk_alone() -> None:
    model = get_model(CONFIGS / "blis--llama-4-scout-17b-16e-instruct-fp8-dynamic.json", tensor_parallel=4)
    long, short = (
        simulate(make_trace([(0, prompt, 3)] * 4), model, DEVICE, "balanced").steps.attention_us[-1]
        for prompt in (8200, 7800)  # three of four layers have chunks of 8,192 tokens
    )
    assert long < short


def test_sweeps_over_tensor_parallel_and_engines() -> None:
    trace = poisson_trace(20, 4, 600, 20, seed=0)
    sweep = serving_sweep({"tensor_parallel": (1, 2, 3), "engine": ("pkv", "vllm")}, trace, "llama-3.1-8b", DEVICE)
    tpot = sweep.values("tpot_s.p50")
    assert (tpot[1] < tpot[0]).all() and np.isnan(tpot[2]).all()
    assert "divisor" in sweep.cells[-1][IMPOSSIBLE]
    with pytest.raises(ValueError, match="tensor_parallel: expected the model by name"):
        serving_sweep({"tensor_parallel": (1, 2)}, trace, MODEL, DEVICE)
