"""What was predicted of measured runs is predicted still, from the constants in the same file."""
from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from paths import EXAMPLES, SHARED
from serving_cases import MODEL, make_trace

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.outside.derive import outside_entry
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.studies.whatif import whatif
from pkvsim.traces.distributions import constant
from pkvsim.traces.readers import load_requests
from pkvsim.traces.requests import RequestTrace, first_requests, scale_rate
from pkvsim.traces.synthetic import make_load

RECORD = json.loads((EXAMPLES / "results" / "h200_serve_predictions.json").read_text())
BOUNDS = {"tokens/s": 0.03, "TPOT p50": 0.05, "TPOT p90": 0.05, "TTFT p50": 0.10, "TTFT p90": 0.10}
TRACES = SHARED / "traces"


def predicting() -> DeviceSpec:
    """The H200 with the constants that were fitted to the server's own steps."""
    device, config = get_device("h200"), ServingConfig()
    name = config.profile.constants
    constants = OutsideConstants(**RECORD["constants"]["constants"])
    entry = replace(outside_entry(device, name), constants=constants, status=RECORD["constants"]["status"])
    return replace(device, outside={**device.outside, name: entry})


def azure(folder) -> RequestTrace:
    return first_requests(load_requests(str(TRACES / "azure2023_code.csv"), limit=300), 300)


def mooncake(folder) -> RequestTrace:
    """The first 60 lines as a file of their own, as they were carried to the GPU: too few ticks to be spread."""
    with (TRACES / "mooncake_conversation.jsonl").open() as file:
        (folder / "mooncake.jsonl").write_text("".join(itertools.islice(file, 60)))
    return load_requests(str(folder / "mooncake.jsonl"))


def closed_loop(folder) -> RequestTrace:
    return make_load(input_tokens=constant(1024), output_tokens=constant(256), requests=64, concurrency=32)


@pytest.mark.parametrize(("at", "load", "seconds"), [(0, azure, 40.0), (1, mooncake, 15.0), (2, closed_loop, None)])
def test_recorded_predictions_hold(at, load, seconds, tmp_path) -> None:
    if seconds is not None and not TRACES.exists():
        pytest.skip("needs the published traces")
    trace, record = load(tmp_path), RECORD["predictions"][at]
    if seconds is not None:
        trace = scale_rate(trace, trace.duration_s / seconds)
    config = ServingConfig(
        prefix_cache="none" if trace.block_hashes is None else "lru", shared_reads=False, max_batch=128,
        steps_in_flight=2,
    )  # fmt: skip
    summary = simulate(trace, MODEL, predicting(), "balanced", config).summary
    assert len(trace) == record["requests"]
    for name, (measured, predicted) in record["figures"].items():
        found: Any = summary["tokens_per_s"]
        if name != "tokens/s":
            latency, percentile = name.split()
            found = summary[f"{latency.lower()}_s"][percentile]
        assert found == pytest.approx(predicted, rel=0.005), name
        assert found == pytest.approx(measured, rel=BOUNDS[name]), name


def test_decode_steps_by_pytorch_s_prices_and_by_the_server_s_own() -> None:
    """What docs/model.md and whatif's note say of the measured cells: the prices of PyTorch's kernels are too high, and
    constants that were fitted to the server's steps near."""
    cells = json.loads((EXAMPLES / "results" / "h200_serve.json").read_text())["cells"]
    less, off = [], []
    for cell in cells:
        rows, context = cell["rows"], cell["context"]
        at_once = make_trace([(0, context, 120)] * rows)
        for device, found in ((get_device("h200"), less), (predicting(), off)):
            steps = simulate(at_once, MODEL, device, "balanced").steps
            alone = (steps.decode_rows == rows) & (steps.prefill_tokens == 0)
            found.append(cell["step_us"] / float(np.median(steps.duration_us[alone])))
    assert (round(100 * (1 - max(less))), round(100 * (1 - min(less)))) == (16, 39)
    assert 0.85 < min(off) and max(off) < 1.02
    for device, told in ((get_device("h200"), True), (predicting(), False)):
        notes = whatif(make_trace([(0, 100, 4)]), MODEL, device, ["balanced"]).notes
        assert any(note.startswith("pkv: all but decode attention at the prices") for note in notes) == told
