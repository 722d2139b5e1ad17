"""What was predicted of measured runs is predicted still, from the constants in the same file."""
from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from paths import EXAMPLES, SHARED
from serving_cases import MODEL

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.outside.derive import outside_entry
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
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


def azure() -> RequestTrace:
    return first_requests(load_requests(str(TRACES / "azure2023_code.csv"), limit=300), 300)


def mooncake() -> RequestTrace:
    return first_requests(load_requests(str(TRACES / "mooncake_conversation.jsonl"), limit=60), 60)


def closed_loop() -> RequestTrace:
    return make_load(input_tokens=constant(1024), output_tokens=constant(256), requests=64, concurrency=32)


@pytest.mark.parametrize(("at", "load", "seconds"), [(0, azure, 40.0), (1, mooncake, 15.0), (2, closed_loop, None)])
@pytest.mark.parametrize("whose", ["recorded", "the device file's"])
def test_recorded_predictions_hold(at, load, seconds, whose) -> None:
    """By the constants of the record, to the last digit; by those of the device file, which never saw these loads
    either, within the same bounds of what was measured."""
    if seconds is not None and not TRACES.exists():
        pytest.skip("needs the published traces")
    trace, record = load(), RECORD["predictions"][at]
    if seconds is not None:
        trace = scale_rate(trace, trace.duration_s / seconds)
    config = ServingConfig(
        prefix_cache="none" if trace.block_hashes is None else "lru", shared_reads=False, max_batch=128,
        steps_in_flight=2,
    )  # fmt: skip
    device = predicting() if whose == "recorded" else get_device("h200")
    summary = simulate(trace, MODEL, device, "balanced", config).summary
    assert len(trace) == record["requests"]
    for name, (measured, predicted) in record["figures"].items():
        found: Any = summary["tokens_per_s"]
        if name != "tokens/s":
            latency, percentile = name.split()
            found = summary[f"{latency.lower()}_s"][percentile]
        assert whose != "recorded" or found == pytest.approx(predicted, rel=1e-9), name
        assert found == pytest.approx(measured, rel=BOUNDS[name]), name
