"""A sample of a run's decode steps simulated task by task: how far its closed-form prices are from that."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, constants_matrix
from pkvsim.models.presets import ModelSpec
from pkvsim.pricing.counters import KV_ELEMENT_BYTES
from pkvsim.pricing.layer import price_route
from pkvsim.pricing.step_times import step_times
from pkvsim.serving.costs import step_models
from pkvsim.serving.result import StepSample
from pkvsim.serving.server_config import ServingConfig
from pkvsim.timeline import timeline


@dataclass(frozen=True, slots=True)
class TimelineCheck:
    """Kernel time of one layer with full attention on the routes taken, summed over the sampled steps."""

    steps: int
    mean_error: float  # mean of |closed form / timeline - 1|
    # What the routes taken cost above each step's cheapest route, all by timeline, the host's part included.
    regret: float


def check_timeline(
    sample: StepSample, model: ModelSpec, device: DeviceSpec, config: ServingConfig
) -> TimelineCheck | None:
    """Simulates every route of every sampled step; None for a run that never decoded."""
    if not len(sample.rows):
        return None
    shape, routes = model.shape(config.page_size), step_models(device, config)
    constants = constants_matrix(routes)
    layers = model.num_full_layers or model.num_sliding_layers
    errors, taken_us, best_us = [], 0.0, 0.0
    for lens, index, splits in sample.steps():
        kernels = np.full(len(ROUTES), np.inf)
        for name, route in routes.items():
            kernels[ROUTES.index(name)] = timeline.makespan_us(route, shape, lens, num_sms=device.num_sms)
        best_us += _step_us(lens, layers, constants, kernels).min()
        if splits:
            kernels[index] = timeline.makespan_us(
                routes[ROUTES[index]], shape, lens, num_sms=device.num_sms, splits=splits
            )
        taken_us += _step_us(lens, layers, constants, kernels)[index]
        closed_us, _ = price_route(
            lens.astype(np.int64), shape.num_kv_heads, shape.group_size, shape.head_dim, KV_ELEMENT_BYTES,
            device.num_sms, constants[index], splits,
        )  # fmt: skip
        errors.append(abs(closed_us / kernels[index] - 1))
    return TimelineCheck(steps=len(errors), mean_error=float(np.mean(errors)), regret=taken_us / best_us - 1)


def _step_us(lens: np.ndarray, layers: int, constants: np.ndarray, layer_us: np.ndarray) -> np.ndarray:
    """A step of `layers` layers on every route, float64 [R], from a layer's kernel time on each; inf where unknown."""
    gpu_us, host_us = np.empty((2, len(ROUTES)))
    step_times(lens, layers, constants, layer_us, gpu_us, host_us)
    return gpu_us + host_us
