"""Which unit a trace's numeric timestamps have, where publishers use several under one name."""
from __future__ import annotations

import numpy as np

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
STEPS = "steps"  # of the paper's format: decode steps of a server
TIME_UNITS = (*SECONDS, STEPS)
# Timestamps after 1970 of the years 2001 to 2096, by the unit that they can be nothing else in.
EPOCH = {"ms": (1e12, 4e12), "us": (1e15, 4e15), "ns": (1e18, 4e18)}
# Requests per second that a trace of seconds has at least, by whether its timestamps have fractions. Whole numbers
# are milliseconds by Mooncake's definition, unless they would mean 200 requests/s or more. Fractions are how seconds
# are written (Bailian's), unless a trace of seconds would have one request in half a minute.
LEAST_RATE_WHOLE = 0.2
LEAST_RATE_FRACTIONS = 1 / 30


def check_time_unit(time_unit: str | None) -> None:
    """Refuses what is no unit."""
    if time_unit is not None and time_unit not in TIME_UNITS:
        raise ValueError(f"time_unit: expected one of {', '.join(TIME_UNITS)}, got {time_unit!r}")


def decide_unit(timestamps: np.ndarray) -> tuple[str, str]:
    """The unit (a key of SECONDS) of timestamps float64 [n], which are finite, and why.

    Dates after 1970 say it by their size. Elsewhere it is seconds or milliseconds, whichever makes the better
    rate: see LEAST_RATE_WHOLE and LEAST_RATE_FRACTIONS. The rule is ours; no format marks its unit.
    """
    low, high = float(timestamps.min()), float(timestamps.max())
    for unit, (first, last) in EPOCH.items():
        if first <= low and high < last:
            return unit, "they are times after 1970"
    fractions = bool((timestamps != np.floor(timestamps)).any())
    shown = "fractions" if fractions else "whole numbers"
    if high == low:
        return "ms", f"{shown}, all equal"
    rate = len(timestamps) / (high - low)  # requests per second, were they seconds
    unit = "s" if rate >= (LEAST_RATE_FRACTIONS if fractions else LEAST_RATE_WHOLE) else "ms"
    rate /= SECONDS[unit]
    return unit, f"{shown}, which makes {f'{rate:.3g}' if rate < 1000 else f'{rate:,.0f}'} requests/s"
