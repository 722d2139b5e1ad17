"""Published serving points: mean TTFT and TPOT of closed loops of fixed lengths, and what our prices say of them.

The table is that of aiconfigurator's silicon_sample.csv (github.com/ai-dynamo/aiconfigurator, Apache-2.0), which has
its own runs and those of SemiAnalysis InferenceX.
"""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.fitting.closed_loop import closed_loop
from pkvsim.models.model_costs import kv_bytes_per_token, weight_bytes
from pkvsim.models.model_spec import ModelSpec, Weights
from pkvsim.models.presets import catalogue, get_model
from pkvsim.models.quantization import fp8
from pkvsim.outside.engine_profile import EngineProfile, get_profile
from pkvsim.outside.step_costs import StepCosts, step_costs

COLUMNS = (
    "backend", "model_path", "system", "precision", "isl", "osl", "tp_size", "concurrency", "silicon_ttft_ms",
    "silicon_tpot_ms", "source",
)  # fmt: skip
DEVICE_NAMES = {"h200_sxm": "h200", "h100_sxm": "h100_sxm", "b200_sxm": "b200", "l40s": "l40s", "a100_sxm": "a100_80gb"}
LEAST_SHARE = 0.8  # InferenceX draws lengths evenly from 0.8 of the nominal one up to it
MEMORY_FRACTION, WORKSPACE_GIB = 0.9, 2.0  # of the runs, by their README
STEP_TOKENS = 8192
# Nothing says how SGLang's runs were set. Its max_prefill_tokens is 16,384 by default, which half of the points predict
# the other half with; its chunked_prefill_size of 8,192 does so half as well.
ENGINE_STEP_TOKENS = {"sglang": 16384}
# InferenceX gives TensorRT-LLM's server `kv_cache_config: dtype: fp8` (github.com/SemiAnalysisAI/InferenceX,
# benchmarks/70b_fp8_h200_trt_slurm.sh). Of other points nothing says so, and 16 bits fit them.
NARROW_KV = ("InferenceX", "trtllm")
REQUESTS_PER_CLIENT, MOST_REQUESTS = 10, 2048
STARTUP_TTFT_MS = 5000.0  # beyond: start-up, or a queue for a full cache


@dataclass(frozen=True, slots=True)
class ServingPoint:
    """One point; lengths in tokens, times in ms."""

    engine: str
    model: str
    device: str
    precision: str  # "fp8", or empty for 16 bits
    prompt: int
    output: int
    tensor_parallel: int
    clients: int
    ttft_ms: float
    tpot_ms: float
    drawn_lengths: bool  # from LEAST_SHARE of the nominal length up to it
    ttft_counts: bool  # False where the TTFT has in it what a server does not spend on the request
    kv_element_bytes: float = 2.0


def read_points(path: str | Path) -> list[ServingPoint]:
    """The table's points; ValueError naming file, line and field."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}: expected columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
            return [_point(f"{path}:{reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read points: {error}") from None


def _point(where: str, row: dict[str, str]) -> ServingPoint:
    def number(name: str, kind: type) -> float:
        try:
            value = kind(row[name])
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {name}: expected a number, got {row[name]!r}") from None
        if not 0 < value < np.inf:
            raise ValueError(f"{where}: {name}: expected a number > 0, got {row[name]!r}")
        return value

    ttft = number("silicon_ttft_ms", float)
    drawn = row["source"] == "InferenceX"
    # The TTFT of TensorRT-LLM's points of this source grows with the output's length: a queue is in it.
    queued = not drawn and row["backend"] == "trtllm"
    return ServingPoint(
        engine=row["backend"], model=row["model_path"], device=DEVICE_NAMES.get(row["system"], row["system"]),
        precision=row["precision"] or "", prompt=int(number("isl", int)), output=int(number("osl", int)),
        tensor_parallel=int(number("tp_size", int)), clients=int(number("concurrency", int)), ttft_ms=ttft,
        tpot_ms=number("silicon_tpot_ms", float), drawn_lengths=drawn,
        ttft_counts=not queued and ttft < STARTUP_TTFT_MS,
        kv_element_bytes=1.0 if (row["source"], row["backend"]) == NARROW_KV else 2.0,
    )  # fmt: skip


def point_model(point: ServingPoint) -> ModelSpec:
    """The preset that a point's model is, in its precision, on one of its GPUs; ValueError where there is none."""
    name = point.model.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    found = next((preset for preset in catalogue() if preset == name or preset.startswith(f"{name}-tp")), None)
    if found is None:
        raise ValueError(f"points: no preset of the model {point.model}")
    model = get_model(found, tensor_parallel=point.tensor_parallel)
    return _in_fp8(model) if point.precision == "fp8" else model


def _in_fp8(model: ModelSpec) -> ModelSpec:
    bits = fp8().bits

    def narrow(weights: Weights) -> Weights:
        return replace(weights, bytes=min(weights.bytes, weights.parameters * bits / 8))

    layers = tuple(
        replace(one, attention_weights=narrow(one.attention_weights), mlp=narrow(one.mlp), expert=narrow(one.expert))
        for one in model.layers
    )
    return replace(model, layers=layers, quantization="fp8")


def price_points(
    points: Sequence[ServingPoint], device: DeviceSpec, constants: OutsideConstants
) -> np.ndarray:
    """(TTFT, TPOT) in ms of every point on this GPU: float64 [points, 2]."""
    costs: dict[tuple[str, str, int, str, float], tuple[StepCosts, int]] = {}
    priced = np.zeros((len(points), 2))
    for at, point in enumerate(points):
        profile = get_profile(point.engine)
        key = (point.model, point.precision, point.tensor_parallel, point.engine, point.kv_element_bytes)
        if key not in costs:
            model = point_model(point)
            tables = step_costs(
                model, device, constants, profile, step_tokens=ENGINE_STEP_TOKENS.get(point.engine, STEP_TOKENS),
                max_batch=max(p.clients for p in points), kv_element_bytes=point.kv_element_bytes,
            )  # fmt: skip
            costs[key] = tables, cache_tokens(model, device, point.kv_element_bytes)
        tables, room = costs[key]
        priced[at] = _run(point, profile, tables, room)
    return priced


def cache_tokens(model: ModelSpec, device: DeviceSpec, kv_element_bytes: float = 2.0) -> int:
    """Tokens that the cache of a server with these settings holds."""
    left = device.memory_gib * MEMORY_FRACTION - WORKSPACE_GIB - weight_bytes(model) / 2**30
    return max(1, int(left * 2**30 / kv_bytes_per_token(model, kv_element_bytes)))


def _run(point: ServingPoint, profile: EngineProfile, tables: StepCosts, room: int) -> tuple[float, float]:
    count = min(MOST_REQUESTS, REQUESTS_PER_CLIENT * point.clients)
    generator = np.random.default_rng([point.prompt, point.output, point.clients])
    lengths = [
        generator.integers(int(LEAST_SHARE * most), most + 1, count)
        if point.drawn_lengths
        else np.full(count, most, np.int64)
        for most in (point.prompt, point.output)
    ]
    ttft_us, tpot_us = closed_loop(
        tables, lengths[0], lengths[1], point.clients,
        ENGINE_STEP_TOKENS.get(point.engine, STEP_TOKENS), room, profile.reserve_output,
        profile.steps_in_flight, profile.mixes,
    )  # fmt: skip
    return ttft_us / 1e3 + profile.queue_ms + profile.output_ms, tpot_us / 1e3
