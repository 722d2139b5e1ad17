"""Decode steps over selected pages: what they cost, what their summaries take, and where nothing changes."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import ROOT
from serving_cases import DEVICE, GPT_OSS, MODEL, make_trace

from pkvsim import DecodeShape
from pkvsim.memory.tier_options import TierSetup
from pkvsim.memory.tier_presets import find_tiers
from pkvsim.models.presets import get_model
from pkvsim.policy.selecting import selection_prices
from pkvsim.pricing.selected import selected_step_time
from pkvsim.pricing.step_times import step_time
from pkvsim.selection.rules import Budget
from pkvsim.selection.setup import SelectionSetup, parse_selection
from pkvsim.serving.costs import page_budget, step_models
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.studies.sweep import serving_sweep, step_sweep
from pkvsim.studies.whatif import whatif

SETUP = SelectionSetup()
DENSE = ServingConfig(kv_gib=32.0, step_tokens=1 << 18)  # all prompts in one step
SELECTING = replace(DENSE, select=SETUP)
SHAPE = DecodeShape(32, 8, 128, 16)  # of MODEL
LATENT = ROOT / "tests/models/configs/blis--deepseek-v2-lite.json"
rows = st.lists(st.tuples(st.just(0.0), st.integers(1, 12_000), st.integers(1, 6)), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(rows, st.sampled_from(["balanced", "calibrated", "flashinfer"]), st.integers(1, 3), st.floats(0.02, 1),
       st.booleans())  # fmt: skip
@example([(0.0, 10712, 6)], "balanced", 3, 0.03125, False)  # the GPU would be sooner, the host later
def test_attention_is_never_dearer_than_over_all_pages(rows, policy, every, budget, graphs) -> None:
    trace = make_trace(rows)
    setup = SelectionSetup(budget=Budget(budget), every=every)
    config = replace(DENSE, graphs=graphs)
    selected, dense = (simulate(trace, MODEL, DEVICE, policy, one) for one in (replace(config, select=setup), config))
    np.testing.assert_array_equal(selected.steps.decode_rows, dense.steps.decode_rows)
    assert (selected.steps.attention_us <= dense.steps.attention_us * (1 + 1e-12)).all()
    assert (selected.steps.attention_us >= selected.steps.best_attention_us * (1 - 1e-12)).all()
    told = selected.summary["selection"]
    assert told["steps"] == np.count_nonzero(selected.steps.attention_us < dense.steps.attention_us)
    assert told["attention_us_dense"] == pytest.approx(dense.totals["attention_us"], rel=1e-9)
    assert told["listed_bytes"] <= told["whole_bytes"] and (told["scored_bytes"] > 0) == (told["steps"] > 0)
    if policy == "flashinfer":
        assert not told["steps"]
    assert not dense.summary["selection"]["steps"]


@pytest.mark.parametrize(("every", "graphs"), [(1, True), (3, True), (3, False)])
def test_the_arithmetic_of_one_long_step(every, graphs) -> None:
    """8 rows of 16K: 30 of 32 layers select, or read what another layer has selected, and two read all pages."""
    setup, config = replace(SETUP, every=every), replace(DENSE, graphs=graphs)
    trace = make_trace([(0.0, 16_000, 2)] * 8)
    run = simulate(trace, MODEL, DEVICE, "balanced", replace(config, select=setup))
    last, told = run.steps.decode_rows.argmax(), run.summary["selection"]
    assert run.steps.decode_rows[last] == 8
    prices = selection_prices(SHAPE, DEVICE, setup)
    layer = prices.of([16_001] * 8)
    mean_us = (30 * layer.selected_us + 2 * layer.dense_us) / 32
    constants = step_models(DEVICE, config)["balanced"].to_row()
    if graphs:
        step_us = sum(step_time(constants, 8, 1, 32, mean_us))
    else:  # selecting takes the host a launch more in one of so many layers
        step_us = sum(selected_step_time(constants, 8, 32, mean_us, prices.prices.run_us / every * 30 / 32))
    assert run.steps.attention_us[last] == pytest.approx(step_us, rel=1e-9)
    steps = np.count_nonzero(run.steps.decode_rows)
    assert told["steps"] == steps and told["step_share"] == 1.0
    assert told["scored_bytes"] / run.steps.decode_rows.sum() == pytest.approx(30 * 1001 * 4096 / every)
    assert told["saved_share"] == pytest.approx(1 - run.totals["attention_us"] / told["attention_us_dense"])


def test_short_rows_go_dense_and_take_the_same_time() -> None:
    trace = make_trace([(0.0, 900, 20)] * 2)
    selected, dense = (simulate(trace, MODEL, DEVICE, "balanced", one) for one in (SELECTING, DENSE))
    assert selected.summary["selection"]["steps"] == 0
    np.testing.assert_array_equal(selected.steps.duration_us, dense.steps.duration_us)


def test_summaries_take_memory_beside_the_pages() -> None:
    pages = page_budget(MODEL, DEVICE, DENSE)
    with_summaries = page_budget(MODEL, DEVICE, SELECTING)
    assert with_summaries == int(32 * 2**30 // (32 * 65536 + 30 * 4096)) < pages
    every_layer = replace(DENSE, select=SelectionSetup(dense_layers=0))
    assert page_budget(MODEL, DEVICE, every_layer) == int(32 * 2**30 // (32 * (65536 + 4096)))
    # Layers with windows say themselves what they read, and have no summaries.
    assert page_budget(GPT_OSS, DEVICE, SELECTING) > page_budget(GPT_OSS, DEVICE, DENSE) * 15 / 16


@pytest.mark.parametrize(("change", "words"), [
    ({"engine": "vllm"}, "engine: expected pkv where pages are selected, got vllm"),
    ({"kv_parallel": 2}, "kv_parallel: expected 1"), ({"kv_dtype": "int8"}, "kv_dtype: expected 16 bits"),
    ({"query_tokens": 2, "acceptance": 0.5}, "query_tokens: expected 1 where pages are selected, got 2"),
    ({"tiers": TierSetup(tiers=find_tiers(["host:1GiB:50"], {}))}, "tiers: expected none"),
])  # fmt: skip
def test_what_is_not_served_is_refused_by_name(change, words) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SELECTING, **change)


def test_a_model_of_latent_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="select: .*expected grouped-query attention over all tokens, got"):
        page_budget(get_model(str(LATENT)), DEVICE, replace(SELECTING, kv_gib=None))


def test_whatif_and_sweeps_say_what_is_selected() -> None:
    trace = make_trace([(0.0, 16_000, 3)] * 8)
    report = whatif(trace, MODEL, DEVICE, ["balanced", "flashinfer"], SELECTING)
    assert any("30 of 32 layers read selected pages" in note for note in report.notes)
    assert any("no step selected under flashinfer" in note for note in report.notes)
    assert report.basis[-1].quantity == "selected pages" and report.basis[-1].basis == "fitted"
    assert report.to_dict()["config"]["select"]["method"] == "mean_std"
    table = serving_sweep({"select": ("off", "mean_std:0.1", "mean_std:2")}, trace, MODEL, DEVICE, "balanced", DENSE)
    off, on, bad = table.values("selection.steps")
    assert on == report.results["balanced"].summary["selection"]["steps"] > 0 == off and np.isnan(bad)
    steps = step_sweep({"batch": (1, 64), "length": (4096, 32768), "select": ("off", "quest:0.1")}, SHAPE, DEVICE)
    us = steps.values("us")
    assert (us[..., 1] <= us[..., 0]).all() and us[1, 1, 1] < us[1, 1, 0] / 3 and us[0, 0, 1] == us[0, 0, 0]
    assert steps.cells[-1]["route"] == "selected" and steps.cells[1]["route"] == "balanced"
    assert parse_selection("quest:0.1").method == "quest"
