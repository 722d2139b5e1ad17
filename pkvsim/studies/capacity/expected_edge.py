"""Where the highest rate is expected, by how far the rates that were tried are from their objectives' bounds.

Between two rates near one another a latency's percentile is close to a power of the rate. Long traces are searched by
their first requests at first: these cost a fraction of a run, and what their latencies do as the rate rises the whole
trace's do as well, though at other rates.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pkvsim.studies.objectives import Outcome
from pkvsim.traces.requests import RequestTrace, first_requests

FIRST_SHARE = 1 / 8  # of the requests
LEAST_FIRST = 500  # below which a part says too little to be worth its runs
PART_TOLERANCE = 0.15  # The whole trace's edge lies elsewhere by as much.


def first_part(trace: RequestTrace) -> RequestTrace | None:
    """The requests by which a search begins; None where the trace is too short to have such."""
    part = first_requests(trace, max(1, int(len(trace) * FIRST_SHARE)))
    return part if len(part) >= LEAST_FIRST and part.rate_per_s is not None else None


def overshoot(outcomes: Sequence[Outcome], *, saturated: bool) -> float | None:
    """The logarithm of the largest percentile over its bound: below 0 where all are met. None where that does not say
    whether the rate is kept."""
    if any(outcome.value_s is None for outcome in outcomes):
        return None
    most = max(math.log(max(outcome.value_s or 0.0, 1e-9) / outcome.objective.bound_s) for outcome in outcomes)
    return None if saturated and most <= 0 else most


def expected_edge(
    tried: Mapping[float, float | None],
    kept: float | None,
    missed: float | None,
    guide: Mapping[float, float | None] | None = None,
) -> float | None:
    """The rate whose overshoot is expected to be 0; None where too little is known.

    tried: overshoots by rate, those of kept and missed among them. guide: those of the trace's first part, whose slope
    is taken where only one end was tried.
    """
    if kept is not None and missed is not None:
        low, high = tried.get(kept), tried.get(missed)
        if low is None or high is None or not low < high:
            return None
        return float(kept * (missed / kept) ** (-low / (high - low)))
    known = kept if kept is not None else missed
    off = None if known is None else tried.get(known)
    curve = sorted((rate, value) for rate, value in (guide or {}).items() if value is not None)
    if known is None or off is None or len(curve) < 2:
        return None
    rates, values = np.log([rate for rate, _ in curve]), np.maximum.accumulate([value for _, value in curve])
    # The trace's curve is the part's, raised by what the two differ at the rate that was tried.
    raised = values + off - np.interp(math.log(known), rates, values)
    if not raised[0] < 0 < raised[-1]:
        return None
    at = int(np.searchsorted(raised, 0))
    share = -raised[at - 1] / (raised[at] - raised[at - 1])
    return float(np.exp(rates[at - 1] + share * (rates[at] - rates[at - 1])))
