"""How fast the simulator is, on the machine at hand; not part of the tests, because time is no property of the code.

    .venv/bin/python -m pytest -n 0 tests/benchmarks/bench_serving.py

Runs on the Mooncake trace where ../shared has it, on one made up like it elsewhere. The first call of each, which
compiles or loads the cache, is not counted. Peak memory of the process and cost per request are under `extra_info`
with --benchmark-json=FILE.
"""
from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
from paths import SHARED

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import get_device
from pkvsim.devices.route_model import ROUTES, constants_matrix
from pkvsim.models.presets import get_model
from pkvsim.models.weight_bits import with_weight_bits
from pkvsim.pricing.cuts import sorted_lengths
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.prices import Candidates, price_routes
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.timeline import timeline
from pkvsim.traces.readers import load_requests
from pkvsim.traces.requests import RequestTrace

MOONCAKE = SHARED / "traces" / "mooncake_conversation.jsonl"
MODEL = get_model("llama-3.1-8b")


@pytest.fixture(scope="module")
def trace() -> RequestTrace:
    if MOONCAKE.exists():
        return load_requests(MOONCAKE)
    random = np.random.Generator(np.random.PCG64(0))
    n = 12_031
    prompt = random.lognormal(8.85, 1.1, n).astype(np.int64).clip(1, 120_000)
    output = random.lognormal(5.6, 0.8, n).astype(np.int64).clip(1, 2000)
    return RequestTrace("like Mooncake", np.sort(random.uniform(0, 3540, n)), prompt, output)


def repeated(trace: RequestTrace, times: int) -> RequestTrace:
    """The trace `times` times over, one after the other."""
    span = trace.duration_s + 1
    return replace(
        trace,
        arrival_s=np.concatenate([trace.arrival_s + at * span for at in range(times)]),
        prompt_tokens=np.tile(trace.prompt_tokens, times),
        output_tokens=np.tile(trace.output_tokens, times),
        block_hashes=None,
        block_offsets=None,
    )


def measure(benchmark, trace, device, bits, config=ServingConfig()) -> None:
    model, spec = with_weight_bits(MODEL, bits), get_device(device)
    result = benchmark.pedantic(
        simulate, args=(trace, model, spec, "calibrated", config), rounds=3, warmup_rounds=1
    )
    benchmark.extra_info.update(
        requests=len(trace),
        steps=result.summary["steps"],
        output_tokens=result.summary["output_tokens"],
        us_per_request=benchmark.stats["min"] / len(trace) * 1e6,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


@pytest.mark.parametrize(("device", "bits"), [("h200", 16), ("rtx3060", 4)])
def test_serving(benchmark, trace, device, bits) -> None:
    measure(benchmark, trace, device, bits)


@pytest.mark.parametrize("prefix_cache", ["lru", "belady", "infinite"])
def test_serving_with_a_prefix_cache(benchmark, trace, prefix_cache) -> None:
    if trace.block_hashes is None:
        pytest.skip("the made-up trace has no block hashes")
    measure(benchmark, trace, "h200", 16, ServingConfig(prefix_cache=prefix_cache))


@pytest.mark.parametrize(("device", "bits"), [("h200", 16), ("rtx3060", 4)])
def test_serving_four_times_the_requests(benchmark, trace, device, bits) -> None:
    measure(benchmark, repeated(trace, 4), device, bits)


def ragged_rows() -> np.ndarray:
    """256 lengths up to 64K, all different, longest first."""
    return np.sort(np.random.Generator(np.random.PCG64(0)).integers(1, 65536, 256))[::-1].astype(np.int32)


def test_price_256_rows_on_every_route(benchmark) -> None:
    device = get_device("h200")
    prices, splits = np.zeros(len(ROUTES)), np.zeros(len(ROUTES), np.int64)
    none = np.zeros(len(ROUTES), np.int64)
    candidates = Candidates(constants_matrix(device_routes(device)), none, none)
    rows, heads = sorted_lengths(ragged_rows()), heads_of(MODEL.shape(16), device.num_sms)
    benchmark(price_routes, rows, heads, candidates, prices, splits)


@pytest.mark.parametrize("route", ROUTES)
def test_simulate_256_rows_task_by_task(benchmark, route) -> None:
    device = get_device("h200")
    model, shape = device_routes(device)[route], MODEL.shape(16)
    benchmark(timeline.simulate, model, shape, ragged_rows(), num_sms=device.num_sms)


def test_simulate_256_rows_on_every_route(benchmark) -> None:
    device, shape = get_device("h200"), MODEL.shape(16)
    models, rows = list(device_routes(device).values()), ragged_rows()
    benchmark(lambda: [timeline.simulate(model, shape, rows, num_sms=device.num_sms) for model in models])


def test_makespan_of_256_rows_on_every_route(benchmark) -> None:
    """What the oracle pays for a step: no task's slot and times are kept."""
    device, shape = get_device("h200"), MODEL.shape(16)
    models, rows = list(device_routes(device).values()), ragged_rows()
    benchmark(lambda: [timeline.makespan_us(model, shape, rows, num_sms=device.num_sms) for model in models])
