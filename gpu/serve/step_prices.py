"""What pkvsim says of each step that a server has run, and constants fitted to such steps.

Prices are whatif's, of the very rows and chunks measured (pkvsim.studies.served). Two runs of one trace drift apart
until few of their steps are alike, while here nothing differs but prices. What is fitted are the constants of a step
outside paged decode attention (pkvsim.devices.outside_constants), by one server's steps on one GPU.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np

from gpu.serve.step import StepRecord
from pkvsim.devices.device import DeviceSpec
from pkvsim.models.presets import ModelSpec
from pkvsim.serving.server_config import ServingConfig
from pkvsim.studies.served.fit import fit_served
from pkvsim.studies.served.prices import price_served
from pkvsim.studies.served.steps import ServedStep, step_us


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
    return step_us(*(np.array([getattr(step, name) for step in steps]) for name in ("start_us", "end_us", "follows")))


def served_steps(steps: Sequence[StepRecord]) -> list[ServedStep]:
    """The steps as pkvsim prices them."""
    return [
        ServedStep(step.decode_lens, step.chunk_begins, step.chunk_tokens, step.follows, float(us))
        for step, us in zip(steps, measured_us(steps))
    ]


def price_steps(steps: Sequence[StepRecord], model: ModelSpec, device: DeviceSpec,
                config: ServingConfig) -> np.ndarray:
    """Predicted times in us, float64 [steps], of steps in the order in which they ran."""
    return price_served(served_steps(steps), model, device, config)


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
    """The device with constants, under the name that the server's engine has there, that price these steps best
    (fit_served). source: of the entry. ValueError where no step follows another."""
    return fit_served([served_steps(steps)], model, device, config, source=source, date=date.today().isoformat())
