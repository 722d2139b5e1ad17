"""What pictures and pages of a run show: time by part, distributions, and figures over the run."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pkvsim.serving.results.logs import StepLog
from pkvsim.serving.results.result import ServingResult

WIDE_RATIO = 20
MAX_POINTS = 2000  # A distribution's curve has no more points.
PARTS = {"decode attention": "attention_us", "rest of decode": "rest_us", "prefill": "prefill_us"}


def busy_parts_s(result: ServingResult) -> dict[str, float]:
    """Seconds of GPU time by part over the whole run."""
    return {name: result.totals[column] / 1e6 for name, column in PARTS.items()}


def time_edges(results: Sequence[ServingResult], bins: int) -> np.ndarray:
    """Edges [bins + 1], in s, of equal bins from the first step of the runs to their last one's end."""
    logs = [result.steps for result in results if len(result.steps.start_s)]
    ends = [log.start_s[-1] + log.duration_us[-1] * log.steps[-1] / 1e6 for log in logs]
    return np.linspace(min((log.start_s[0] for log in logs), default=0.0), max(ends, default=1.0), bins + 1)


def spread(steps: StepLog, totals: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The sum of totals [m] in each bin [len(edges) - 1]: an entry's total lies evenly over its steps' time."""
    if not len(steps.start_s):
        return np.zeros(len(edges) - 1)
    ends = steps.start_s + steps.duration_us * steps.steps / 1e6
    summed = np.cumsum(totals)
    reached = np.stack((np.append(0.0, summed[:-1]), summed), 1).ravel()
    return np.diff(np.interp(edges, np.stack((steps.start_s, ends), 1).ravel(), reached, left=0.0, right=summed[-1]))


def busy_shares(steps: StepLog, edges: np.ndarray) -> dict[str, np.ndarray]:
    """Share of each bin's wall time [len(edges) - 1] by part; what no part fills is idle."""
    widths_us = np.diff(edges) * 1e6
    sums_us = {name: spread(steps, getattr(steps, column) * steps.steps, edges) for name, column in PARTS.items()}
    return {name: sum_us / widths_us for name, sum_us in sums_us.items()}


def over_time(result: ServingResult, edges: np.ndarray) -> dict[str, np.ndarray]:
    """Figures by name, each [len(edges) - 1]: means over the wall time of a bin, in which an idle server counts as 0;
    the mean step is NaN where there is none."""
    steps, widths_us = result.steps, np.diff(edges) * 1e6
    busy_us = steps.duration_us * steps.steps

    def mean(values: np.ndarray) -> np.ndarray:
        return spread(steps, values * busy_us, edges) / widths_us

    busy, count = spread(steps, busy_us, edges), spread(steps, steps.steps, edges)
    with np.errstate(invalid="ignore", divide="ignore"):
        step_ms = np.where(count > 1e-9, busy / count / 1e3, np.nan)
    attention = busy_shares(steps, edges)["decode attention"]
    return {
        "running requests": mean(steps.rows),
        "waiting requests": mean(steps.waiting),
        "KV pages in use, %": mean(steps.pages) / result.num_pages * 100,
        "GPU busy, %": busy / widths_us * 100,
        "decode attention, % of the time": attention * 100,
        "mean step, ms": step_ms,
    }


def is_wide(curves: Iterable[np.ndarray]) -> bool:
    """Whether the middle nine tenths of all values together span so much that an axis of them should be logarithmic."""
    values = np.concatenate([*curves, np.empty(0)])
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.percentile(values, (5, 95))
    return bool(high > WIDE_RATIO * low)


def distribution(values: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(values ascending, share of all at or below each) of those that are not NaN, thinned to at most `points`."""
    known = np.sort(values[~np.isnan(values)])
    share = np.arange(1, len(known) + 1) / max(1, len(known))
    if len(known) > points:
        kept = np.unique(np.linspace(0, len(known) - 1, points).round().astype(int))
        known, share = known[kept], share[kept]
    return known, share
