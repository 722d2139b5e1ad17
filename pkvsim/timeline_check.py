"""A sample of a run's decode steps simulated task by task: how far its closed-form prices are from that."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim import timeline
from pkvsim.cost import KV_ELEMENT_BYTES
from pkvsim.derive import device_routes
from pkvsim.device import DeviceSpec
from pkvsim.models import ModelSpec
from pkvsim.pricing import price_route
from pkvsim.route_model import ROUTES
from pkvsim.serving_result import StepSample


@dataclass(frozen=True, slots=True)
class TimelineCheck:
    """Kernel time of one layer with full attention on the routes taken, summed over the sampled steps."""

    steps: int
    mean_error: float  # mean of |closed form / timeline - 1|
    regret: float  # what the routes taken cost above each step's cheapest route, all by timeline, planning included


def check_timeline(sample: StepSample, model: ModelSpec, device: DeviceSpec, page_size: int) -> TimelineCheck | None:
    """Simulates every route of every sampled step; None for a run that never decoded."""
    if not len(sample.rows):
        return None
    shape, routes = model.shape(page_size), device_routes(device)
    layers = max(1, model.num_full_layers)
    errors, taken_us, best_us = [], 0.0, 0.0
    for lens, index, splits in sample.steps():
        step_us = {
            name: timeline.simulate(entry, shape, lens, num_sms=device.num_sms).makespan_us * layers + entry.plan_us
            for name, entry in routes.items()
        }
        name = ROUTES[index]
        kernel_us = timeline.simulate(
            routes[name], shape, lens, num_sms=device.num_sms, splits=splits or None
        ).makespan_us
        closed_us, _ = price_route(
            lens.astype(np.int64), shape.num_kv_heads, shape.group_size, shape.head_dim, KV_ELEMENT_BYTES,
            device.num_sms, routes[name].to_row(), splits,
        )  # fmt: skip
        errors.append(abs(closed_us / kernel_us - 1))
        taken_us += kernel_us * layers + routes[name].plan_us
        best_us += min(step_us.values())
    return TimelineCheck(steps=len(errors), mean_error=float(np.mean(errors)), regret=taken_us / best_us - 1)
