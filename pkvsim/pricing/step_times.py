"""From a layer's kernel time to a step of many layers that the host plans and issues. Compiled."""
from __future__ import annotations

import math

import numpy as np

from pkvsim.pricing.constants import BANDWIDTH, HOST, ISOLATED, PLAN, PLAN_LENGTH, PLAN_ROW, RUN, compiled
from pkvsim.pricing.rows import sorted_lengths


@compiled
def step_times(
    seq_lens: np.ndarray,  # [batch_size] int32 or int64, zeros allowed
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
    rows = 0
    lengths = 0  # distinct ones
    for row in range(len(seq_lens)):
        rows += seq_lens[row] > 0
    for route in range(len(constants)):
        c = constants[route]
        if math.isnan(c[BANDWIDTH]):
            gpu_us[route] = math.inf
            host_us[route] = 0.0
            continue
        if c[PLAN_LENGTH] > 0.0 and lengths == 0:
            ordered = sorted_lengths(seq_lens)
            for row in range(len(ordered)):
                lengths += row == 0 or ordered[row] != ordered[row - 1]
        gpu_us[route], host_us[route] = step_time(c, rows, lengths, layers, layer_us[route])


@compiled
def step_time(c: np.ndarray, rows: int, lengths: int, layers: int, layer_us: float) -> tuple[float, float]:
    """step_times of one route: (gpu_us, host_us). rows: those with tokens; lengths: distinct ones among them, which
    only a route with plan_length_us looks at; layer_us: kernel time of a layer that follows another."""
    waits = max(0.0, (layers - 1) * (c[RUN] - layer_us))
    plan = c[PLAN] + rows * c[PLAN_ROW] + max(0, lengths - 1) * c[PLAN_LENGTH]
    return c[ISOLATED] + layers * layer_us, plan + c[HOST] + waits
