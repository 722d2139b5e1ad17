"""The constants of a whole step, from measurements of steps alone: planning, the first layer, the host's part."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from pkvsim.fitting.measurements import Measurement

ROBUST_SCALE = 0.05  # relative residuals beyond this lose weight
MIN_PLANS = 8  # Fewer plans than this give a median alone.
# The constants of the host's part, as RouteModel names them.
HOST_CONSTANTS = ("plan_us", "plan_row_us", "plan_length_us", "host_us", "run_us")
TINY_US = 1e-3  # A constant below this is written as 0.


def step_constants(measurements: Sequence[Measurement], *, by_length: bool) -> dict[str, Any]:
    """RouteModel's constants of a step beside its layers, those that the measurements tell of, by name.

    by_length: whether planning grows with the number of distinct lengths.
    """
    found: dict[str, float] = {}
    isolated = [m.event_us - m.kernel_us for m in measurements if m.event_us is not None]
    if isolated:
        found["isolated_us"] = max(0.0, float(np.median(isolated)))
    plans = [m for m in measurements if m.plan_us]
    if plans:
        found |= _plan_constants(plans, by_length=by_length)
    first_us = found.get("isolated_us", 0.0)
    host = [
        m.wall_us - m.plan_us - (m.kernel_us + first_us if m.event_us is None else m.event_us)
        for m in measurements
        if m.wall_us is not None and m.plan_us is not None and not m.planned
    ]
    if host:
        found["host_us"] = max(0.0, float(np.median(host)))
    runs = [m.run_us for m in measurements if m.run_us is not None]
    if runs:
        found["run_us"] = float(np.median(runs))
    return {name: float(f"{us:.4g}") if us > TINY_US else 0.0 for name, us in found.items()}


def _plan_constants(plans: Sequence[Measurement], *, by_length: bool) -> dict[str, float]:
    """Planning by rows and, where it grows with them, distinct lengths: least relative residuals, none below 0."""
    measured = np.array([m.plan_us for m in plans])
    lens = [[length for length in m.seq_lens if length] for m in plans]
    columns = {"plan_us": np.ones(len(plans)), "plan_row_us": np.array([len(rows) for rows in lens], float)}
    if by_length:
        columns["plan_length_us"] = np.array([max(0, len(set(rows)) - 1) for rows in lens], float)
    # What does not vary over the table cannot be told from the constant part.
    columns = {name: column for name, column in columns.items() if name == "plan_us" or np.ptp(column) > 0}
    if len(plans) < MIN_PLANS or len(columns) == 1:
        return {"plan_us": float(np.median(measured))}
    table = np.stack(list(columns.values()), axis=1) / measured[:, None]
    start = np.zeros(len(columns))
    start[0] = np.median(measured)
    fitted = least_squares(
        lambda x: table @ x - 1, start, bounds=(0, np.inf), loss="soft_l1", f_scale=ROBUST_SCALE,
        x_scale=np.maximum(start, 0.1),
    )  # fmt: skip
    return dict(zip(columns, fitted.x.tolist()))
