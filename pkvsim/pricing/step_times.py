"""From a layer's kernel time to a step of many layers that the host plans and issues. Compiled."""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import compiled
from pkvsim.pricing.constants import BANDWIDTH, HOST, ISOLATED, PLAN, PLAN_LENGTH, PLAN_ROW, RUN


@compiled
def step_times(
    ordered: np.ndarray,  # [rows] int64 > 0, longest first, as sorted_lengths gives them
    layers: int,
    constants: np.ndarray,  # [num_routes, NUM_CONSTANTS] float64
    layer_us: np.ndarray,  # [num_routes] float64, as price_routes gives it
    gpu_us: np.ndarray,  # [num_routes] float64, out: all layers on a GPU that never waits for the host
    host_us: np.ndarray,  # [num_routes] float64, out: what the step takes by the wall clock above gpu_us
) -> None:
    """A step of `layers` layers planned once: planning, then the layers, issued one after the other by the host.

    Where the GPU ends layers sooner than the host issues them, the host's time to issue counts for all but the last.
    A route of NaN takes infinity on the GPU and nothing on the host.
    """
    distinct = 0
    for row in range(len(ordered)):
        distinct += row == 0 or ordered[row] != ordered[row - 1]
    for route in range(len(constants)):
        if math.isnan(constants[route, BANDWIDTH]):
            gpu_us[route] = math.inf
            host_us[route] = 0.0
        else:
            gpu_us[route], host_us[route] = step_time(constants[route], len(ordered), distinct, layers, layer_us[route])


@compiled
def step_time(constants: np.ndarray, rows: int, distinct: int, layers: int, layer_us: float) -> tuple[float, float]:
    """step_times of one route: (gpu_us, host_us). rows: those with tokens; distinct: lengths among them, which only
    a route with plan_length_us looks at; layer_us: kernel time of a layer that follows another."""
    waits = max(0.0, (layers - 1) * (constants[RUN] - layer_us))
    plan = constants[PLAN] + rows * constants[PLAN_ROW] + max(0, distinct - 1) * constants[PLAN_LENGTH]
    return constants[ISOLATED] + layers * layer_us, plan + constants[HOST] + waits
