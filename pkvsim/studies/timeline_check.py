"""A sample of a run's decode steps simulated task by task: how far its closed-form prices are from that."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.devices.route_options import as_read
from pkvsim.models.presets import ModelSpec
from pkvsim.policy.choose import make_routing
from pkvsim.pricing.cuts import sorted_lengths, tokens_read
from pkvsim.pricing.prices import price_route
from pkvsim.pricing.step_times import step_times
from pkvsim.serving.costs import attention_kinds, step_models
from pkvsim.serving.results.logs import StepSample
from pkvsim.serving.server_config import ServingConfig
from pkvsim.timeline import timeline


@dataclass(frozen=True, slots=True)
class TimelineCheck:
    """Kernel time of one layer of the last kind (with full attention, where there is any) on the routes taken, summed
    over the sampled steps."""

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
    shape, options, layers = attention_kinds(model, config.page_size, config.kv_dtype, config.query_tokens)[-1]
    models = step_models(device, config)
    routing = make_routing(shape, models, device, options=options)
    constants = routing.candidates.constants
    candidates = [index for index in range(len(ROUTES)) if not np.isnan(constants[index, 0])]
    errors, taken_us, best_us = [], 0.0, 0.0
    for lens, taken, splits in sample.steps():
        kernels = np.full(len(ROUTES), np.inf)
        for index in candidates:
            route = ROUTES[index]
            kernels[index] = timeline.makespan_us(
                models[route], shape, lens, num_sms=device.num_sms, options=as_read(route, options)
            )
        best_us += _step_us(lens, layers, constants, kernels).min()
        if splits:
            kernels[taken] = timeline.makespan_us(
                models[ROUTES[taken]], shape, lens, num_sms=device.num_sms, splits=splits,
                options=as_read(ROUTES[taken], options),
            )  # fmt: skip
        taken_us += _step_us(lens, layers, constants, kernels)[taken]
        ordered, reach = sorted_lengths(lens), int(routing.candidates.reaches[taken])
        reads = tokens_read(ordered, reach, constants[taken]) if reach else ordered
        closed_us, _ = price_route(ordered, reads, routing.heads, constants[taken], splits)
        errors.append(abs(closed_us / kernels[taken] - 1))
    return TimelineCheck(steps=len(errors), mean_error=float(np.mean(errors)), regret=taken_us / best_us - 1)


def _step_us(lens: np.ndarray, layers: int, constants: np.ndarray, layer_us: np.ndarray) -> np.ndarray:
    """A step of `layers` layers on every route, float64 [R], from a layer's kernel time on each; inf where unknown."""
    gpu_us, host_us = np.empty((2, len(ROUTES)))
    step_times(sorted_lengths(lens), layers, constants, layer_us, gpu_us, host_us)
    return gpu_us + host_us
