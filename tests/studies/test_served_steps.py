"""Prices of gpu.serve on an H200 beside its recorded steps, and what a fit to such steps keeps to."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EXAMPLES
from serving_cases import MODEL, make_trace

from pkvsim.devices.device import get_device
from pkvsim.devices.outside_constants import read_outside
from pkvsim.outside.derive import outside_entry
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.studies.served.fit import BOUNDS, FITTED_RUNS, fit_files, fit_served, hold_out, served_config
from pkvsim.studies.served.prices import price_served, served_attention_us
from pkvsim.studies.served.steps import ServedStep, measured_us, read_cells, read_served_steps
from pkvsim.studies.whatif import whatif

RESULTS = EXAMPLES / "results"
CELLS, STEPS = RESULTS / "h200_serve.json", RESULTS / "h200_serve_steps.npz"
H200 = get_device("h200")
PKV = H200.outside["pkv"]
VLLM_MS = {(1, 1024): 4.790, (8, 1024): 5.222, (32, 1024): 6.378, (128, 1024): 10.618, (8, 32768): 12.714}  # its page


def decode_ms(rows: int, context: int, engine: str, policy: str) -> float:
    """The median step in which all rows decode, of requests that come at once."""
    config = ServingConfig(engine=engine)
    steps = simulate(make_trace([(0, context, 120)] * rows), MODEL, H200, policy, config).steps
    alone = (steps.decode_rows == rows) & (steps.prefill_tokens == 0)
    return float(np.median(steps.duration_us[alone])) / 1e3


def test_measured_decode_steps_are_priced_within_3_percent_and_below_vllm_s() -> None:
    for cell in json.loads(CELLS.read_text())["cells"]:
        rows, context, measured = cell["rows"], cell["context"], cell["step_us"] / 1e3
        ours = decode_ms(rows, context, "pkv", "balanced")
        assert ours == pytest.approx(measured, rel=0.03), (rows, context)
        if (rows, context) in VLLM_MS:
            theirs = decode_ms(rows, context, "vllm", "engine")
            assert (ours < theirs) == (measured < VLLM_MS[rows, context]), (rows, context)


@pytest.mark.slow
def test_steps_that_were_held_out_are_as_far_off_as_the_device_file_says() -> None:
    runs, (model, cells) = read_served_steps(STEPS), read_cells(CELLS)
    assert model == MODEL.name and sum(len(run) for run in runs.values()) == 3227
    held = [run for name, run in runs.items() if not name.startswith(FITTED_RUNS)]
    config = served_config([step for run in runs.values() for step in run])
    found = hold_out(H200, [*held, cells[1::3]], MODEL, config).outside["pkv"]
    assert found.held_out == PKV.held_out and PKV.held_out.mean_percent < 2
    for run in held:
        off = measured_us(run) / price_served(run, MODEL, H200, config) - 1
        assert np.abs(off).mean() < 0.025 and abs(off.mean()) < 0.02


@pytest.mark.slow
def test_constants_are_the_best_within_what_they_can_be() -> None:
    """None of them prices the steps that they were fitted to better when it alone is moved by 5 %."""
    runs, (_, cells) = read_served_steps(STEPS), read_cells(CELLS)
    steps = [step for name, run in runs.items() if name.startswith(FITTED_RUNS) for step in run]
    config = served_config(steps + cells)
    groups = [steps, [cell for at, cell in enumerate(cells) if at % 3 != 1]]
    attention = [served_attention_us(group, MODEL, H200, config) for group in groups]
    kinds = [np.array([len(step.chunk_begins) > 0 for step in group]) for group in groups]
    follows = [np.array([step.follows for step in group]) for group in groups]

    def loss(constants) -> float:
        device = replace(H200, outside={**H200.outside, "pkv": replace(PKV, constants=constants)})
        total = 0.0
        for group, us, chunked, after in zip(groups, attention, kinds, follows):
            off = np.log(price_served(group, MODEL, device, config, us) / measured_us(group))
            means = [np.sqrt(1 + (off[kind & after] / 0.03) ** 2).mean() for kind in (chunked, ~chunked)
                     if (kind & after).any()]
            total += float(np.mean(means))
        return total

    least = loss(PKV.constants)
    for name, (lowest, most) in BOUNDS.items():
        value = getattr(PKV.constants, name)
        assert lowest <= value <= most, name
        for moved in (value / 1.05, value * 1.05):
            if lowest <= moved <= most:
                assert loss(replace(PKV.constants, **{name: moved})) > least * (1 - 1e-3), (name, moved)


@given(st.floats(0.2, 4), st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_a_fit_stays_within_its_bounds_whatever_was_measured(factor, seed) -> None:
    """Steps that took a fifth of what a GPU needs for them, or four times as long, at random."""
    rng, none = np.random.default_rng(seed), np.zeros(0, np.int64)
    config = ServingConfig(max_batch=32, step_tokens=256, shared_reads=False)
    drawn = [
        ServedStep(
            rng.integers(1, 4000, int(rng.integers(1, 33))), *((none, none) if at % 3 else
            (rng.integers(0, 4000, 1), rng.integers(1, 224, 1))), at % 5 > 0, 1.0,
        )
        for at in range(15)
    ]  # fmt: skip
    us = price_served(drawn, MODEL, H200, config) * factor * rng.lognormal(0, 0.3, len(drawn))
    steps = [replace(step, us=float(took)) for step, took in zip(drawn, us)]
    entry = fit_served([steps], MODEL, H200, config, source="drawn", date="2026-11-30").outside["pkv"]
    for name, (lowest, most) in BOUNDS.items():
        assert lowest * 0.999 <= getattr(entry.constants, name) <= most * 1.001, name
    assert entry.constants.matrix_share <= 1 and entry.constants.weight_share <= 1 and entry.constants.wake_factor >= 1
    assert read_outside("entry", json.loads(json.dumps(entry.to_dict()))) == entry


@pytest.mark.parametrize("name", ["rtx3090", "l4", "h100_sxm", "b200"])
def test_other_gpus_take_pytorch_s_prices_and_whatif_says_so(name) -> None:
    device = get_device(name)
    assert outside_entry(device, "pkv") == outside_entry(device, "pytorch")
    for gpu, told in ((device, True), (H200, False)):
        notes = whatif(make_trace([(0, 100, 4)]), MODEL, gpu, ["balanced"]).notes
        assert any(note.startswith("pkv: all but decode attention at the prices of PyTorch") for note in notes) == told


def test_files_that_hold_no_steps_are_named(tmp_path) -> None:
    bad, empty = tmp_path / "bad.npz", tmp_path / "empty.npz"
    bad.write_bytes(b"PK\x03\x04 no archive")
    np.savez(empty, names=np.array(["one"]))
    with np.load(STEPS) as file:
        data = dict(file)
    late, short = tmp_path / "late.npz", tmp_path / "short.npz"
    np.savez(late, **data | {"end_us": data["start_us"] - 1})
    np.savez(short, **data | {"lens": data["lens"][:100]})
    for path in (bad, empty, late, short, tmp_path / "none.npz"):
        with pytest.raises(ValueError, match=f"{path.name}: cannot read served steps"):
            read_served_steps(path)
    for text in ('{"model": "llama-3.1-8b", "cells": [{"rows": 1}]}', '{"model": 5, "cells": []}', "[]", "{",
                 '{"model": "x", "cells": [{"rows": 1, "context": 9, "step_us": -1}]}',
                 '{"model": "x", "cells": [{"rows": 1e12, "context": 9, "step_us": 1}]}'):
        (tmp_path / "cells.json").write_text(text)
        with pytest.raises(ValueError, match=r"cells\.json: cannot read cells of bench_serve.py"):
            read_cells(tmp_path / "cells.json")
    with pytest.raises(ValueError, match="model: expected the model whose steps they are"):
        fit_files([str(STEPS)], H200, model=None, date="2026-11-30")
