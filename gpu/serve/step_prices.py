"""What pkvsim says of each step that a server has run, and constants fitted to such steps.

Prices are whatif's, of the very rows and chunks measured. Two runs of one trace drift apart until few of their steps
are alike, while here nothing differs but prices. What is fitted are the constants of a step outside paged decode
attention (pkvsim.devices.outside_constants), by one server's steps on one GPU.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from gpu.serve.step import StepRecord
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants, OutsideEntry
from pkvsim.devices.route_model import ROUTES, FitError
from pkvsim.models.presets import ModelSpec
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.step_costs import heated, step_parts
from pkvsim.serving.attention import decode_us
from pkvsim.serving.costs import attention_costs, outside_costs
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of
from pkvsim.serving.state import new_log

POLICY = "balanced"  # the schedule that gpu.serve decodes on
FREE = ("matrix_share", "weight_share", "matrix_us", "attention_share", "attention_us", "attention_half_tokens",
        "kernel_us", "elementwise_passes", "step_us", "row_us", "chunk_step_us")
LOSS_SCALE = 0.03  # relative error beyond which a step counts as an outlier
PRIOR = 0.002  # weight of a constant's relative change, for those that the steps say nothing of


@dataclass(frozen=True, slots=True)
class StepErrors:
    """Steps of one kind against their prices. A mean with its sign tells a bias from scatter."""

    kind: str  # as StepRecord has it, or "all"
    steps: int
    mean: float  # of |measured / predicted - 1|
    bias: float  # of measured / predicted - 1
    p90: float  # of |measured / predicted - 1|


def measured_us(steps: Sequence[StepRecord]) -> np.ndarray:
    """What steps took, float64 [steps]: from the end of the one before where the device should not have waited."""
    starts = np.array([step.start_us for step in steps])
    ends = np.array([step.end_us for step in steps])
    follows = np.array([step.follows for step in steps], bool)
    follows[:1] = False
    return ends - np.where(follows, np.append(0.0, ends[:-1]), starts)


def price_steps(steps: Sequence[StepRecord], model: ModelSpec, device: DeviceSpec,
                config: ServingConfig) -> np.ndarray:
    """Predicted times in us, float64 [steps], of steps in the order in which they ran."""
    return _priced(steps, _attention_us(steps, model, device, config), model, device, config)


def _attention_us(steps: Sequence[StepRecord], model: ModelSpec, device: DeviceSpec,
                  config: ServingConfig) -> np.ndarray:
    """Decode attention of all layers, float64 [steps]."""
    attention = attention_costs(model, device, POLICY, config)
    log = new_log(config.max_batch, len(ROUTES), limits_of(model, device, config))
    found = np.zeros(len(steps))
    for at, step in enumerate(steps):
        log.lens[: step.decode_rows] = np.sort(step.decode_lens)[::-1]
        _, found[at], _ = decode_us(attention, log, step.decode_rows)
    return found


def _priced(steps: Sequence[StepRecord], attention_us: np.ndarray, model: ModelSpec, device: DeviceSpec,
            config: ServingConfig) -> np.ndarray:
    costs = outside_costs(model, device, POLICY, config)
    log = new_log(config.max_batch, len(ROUTES), limits_of(model, device, config))
    found, heat_us = np.zeros(len(steps)), 0.0
    for at, step in enumerate(steps):
        if not step.follows:
            heat_us = 0.0
        warm = heat_us / costs.boost_us if costs.boost_us > 0 else 1.0
        lens = np.sort(step.decode_lens)[::-1]
        us = step_parts(costs, lens, step.chunk_begins, step.chunk_tokens, step.decode_rows + step.chunks,
                        attention_us[at], warm, log.parts)
        found[at] = us if step.follows else us * costs.wake_factor
        heat_us = heated(costs, heat_us, step.decode_rows + step.prefill_tokens, found[at])
    return found


def step_errors(steps: Sequence[StepRecord], predicted_us: np.ndarray) -> list[StepErrors]:
    """Of all steps, then of each kind that there is."""
    off = measured_us(steps) / predicted_us - 1
    kinds = np.array([step.kind for step in steps])
    found = []
    for kind in ("all", "decode", "mixed", "prefill"):
        chosen = off if kind == "all" else off[kinds == kind]
        if len(chosen):
            found.append(StepErrors(kind, len(chosen), float(np.abs(chosen).mean()), float(chosen.mean()),
                                    float(np.percentile(np.abs(chosen), 90))))
    return found


def fit_device(steps: Sequence[StepRecord], model: ModelSpec, device: DeviceSpec, config: ServingConfig, *,
               source: str) -> DeviceSpec:
    """The device with constants, under the name that the server's engine has there, that price these steps best. Decode
    steps and steps with chunks count alike, whatever their number; steps far off count little. source: of the entry."""
    from scipy.optimize import least_squares

    name = config.profile.constants
    start = outside_entry(device, name)
    attention_us, measured = _attention_us(steps, model, device, config), measured_us(steps)
    chunked = np.array([step.chunks > 0 for step in steps])
    counts = np.where(chunked, chunked.sum(), (~chunked).sum())
    weight = np.where([step.follows for step in steps], np.sqrt(len(steps) / counts / 2), 0.0)
    if not weight.any():
        raise ValueError("steps: expected some that follow others, got none")
    origin = np.array([max(1e-3, getattr(start.constants, constant)) for constant in FREE])

    def with_constants(at: np.ndarray) -> DeviceSpec:
        values = {constant: float(f"{value:.4g}") for constant, value in zip(FREE, origin * np.exp(at))}
        return _with_entry(device, name, start, replace(start.constants, **values), source)

    def residuals(at: np.ndarray) -> np.ndarray:
        values = dict(zip(FREE, (origin * np.exp(at)).tolist()))
        tried = _with_entry(device, name, start, replace(start.constants, **values), source)
        off = np.log(_priced(steps, attention_us, model, tried, config) / measured)
        robust = np.sign(off) * LOSS_SCALE * np.sqrt(2 * (np.sqrt(1 + (off / LOSS_SCALE) ** 2) - 1))
        return np.concatenate([weight * robust, PRIOR * np.sqrt(len(steps)) * at])

    found = with_constants(least_squares(residuals, np.zeros(len(FREE)), diff_step=1e-3, bounds=(-4, 4)).x)
    entry, priced = found.outside[name], _priced(steps, attention_us, model, found, config)
    woken = np.array([not step.follows for step in steps])
    if woken.any():  # the first step of a server that was idle, which its price multiplies
        factor = max(1.0, float(np.median(measured[woken] / priced[woken])) * entry.constants.wake_factor)
        priced[woken] *= factor / entry.constants.wake_factor
        entry = replace(entry, constants=replace(entry.constants, wake_factor=float(f"{factor:.4g}")),
                        basis={**entry.basis, "wake_factor": "fitted"})
    percent = 100 * np.abs(measured / priced - 1)
    error = FitError(measurements=len(steps), median_percent=float(f"{np.median(percent):.3g}"),
                     mean_percent=float(f"{percent.mean():.3g}"))
    band = float(f"{np.percentile(percent, 90):.3g}")
    return replace(found, outside={**found.outside, name: replace(entry, in_sample=error, band_percent=band)})


def _with_entry(device: DeviceSpec, name: str, start: OutsideEntry, constants: OutsideConstants,
                source: str) -> DeviceSpec:
    entry = OutsideEntry(
        constants=constants, status="fitted", source=source, date=date.today().isoformat(),
        basis={**start.basis, **dict.fromkeys(FREE, "fitted")}, band_percent=start.band_percent,
    )  # fmt: skip
    return replace(device, outside={**device.outside, name: entry})
