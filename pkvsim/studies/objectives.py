"""Service-level objectives: latencies that a share of the requests must keep, and the goodput under them."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.serving.results.logs import RequestLog
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.results.summary import gap_percentile
from pkvsim.serving.state import SERVED

METRICS = {
    "ttft": "time to first token",
    "tpot": "mean time per output token after the first",
    "e2e": "time from arrival to the last token",
    "queue": "time from arrival to admission",
    "itl": "time between two tokens of a request",
}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}  # seconds
_FORM = "METRIC_pNN=TIME, such as ttft_p90=2s or tpot_p99=50ms"
_OBJECTIVE = re.compile(r"([a-z0-9]+)_p(\d+(?:\.\d+)?)=(\d*\.?\d+(?:e[+-]?\d+)?)([a-z]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Objective:
    """At least `percentile` % of the requests (of itl: of the times between tokens) have a `metric` of at most bound_s.
    ValueError naming the field."""

    metric: str  # of METRICS
    percentile: float  # in (0, 100]
    bound_s: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"slo: expected a metric of {', '.join(METRICS)}, got {self.metric!r}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"slo: {self.metric}: expected a percentile in (0, 100], got p{self.percentile:g}")
        if not 0 < self.bound_s < np.inf:
            raise ValueError(f"slo: {self.name}: expected a time > 0, got {self.bound_s:g} s")

    @property
    def name(self) -> str:
        """As it is written: `ttft_p90`."""
        return f"{self.metric}_p{self.percentile!r}".removesuffix(".0")

    def __str__(self) -> str:
        unit = "s" if self.bound_s >= 1 else "ms" if self.bound_s >= 1e-3 else "us"
        return f"{self.name}={self.bound_s / UNITS[unit]:.12g}{unit}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run made of an objective."""

    objective: Objective
    value_s: float | None  # the percentile; None where so many requests were rejected that it has none

    @property
    def met(self) -> bool:
        """Whether the run keeps the objective."""
        return self.value_s is not None and self.value_s <= self.objective.bound_s

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"value_s": self.value_s, "bound_s": self.objective.bound_s, "met": self.met}


@dataclass(frozen=True, slots=True)
class Goodput:
    """What the requests that keep every bound add up to. A metric's bound is the widest of its objectives': a request
    may be beyond ttft_p50's as long as it is within ttft_p99's. Times between tokens (itl) bound no
    request."""

    requests: int
    request_share: float  # of all requests, rejected ones included
    requests_per_s: float  # over the time from the first arrival to the last token
    tokens_per_s: float  # output tokens, likewise

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """`ttft_p90=2s,tpot_p90=50ms,e2e_p99=30s`; ValueError that says what was expected, and of what part."""
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise ValueError(f"slo: expected {_FORM}, got {text!r}")
    objectives = [_objective(part) for part in parts]
    names = [one.name for one in objectives]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"slo: expected each objective once, got {name} twice")
    return tuple(objectives)


def _objective(text: str) -> Objective:
    parts = _OBJECTIVE.fullmatch("".join(text.lower().split()))
    if parts is None:
        raise ValueError(f"slo: expected {_FORM}, got {text!r}")
    metric, percentile, number, unit = parts.groups()
    if unit not in UNITS:
        raise ValueError(f"slo: {text}: expected a time in {', '.join(UNITS)}, got {number + unit!r}")
    return Objective(metric, float(percentile), float(number) * UNITS[unit])


def evaluate(
    objectives: Sequence[Objective], requests: RequestLog, gaps: np.ndarray | None = None
) -> tuple[Outcome, ...]:
    """What every objective came to. A rejected request is later than any bound; one of a single output token has no
    time per output token and does not count there, nor between tokens (gaps: as ServingResult has them)."""
    outcomes = []
    for one in objectives:
        if one.metric == "itl":
            value = None if gaps is None else gap_percentile(gaps, one.percentile) or 0.0
        else:
            value = _percentile(_times_s(one.metric, requests), one.percentile)
        outcomes.append(Outcome(one, value))
    return tuple(outcomes)


def goodput(objectives: Sequence[Objective], result: ServingResult) -> Goodput:
    """The requests that keep every bound, and what they add up to."""
    log = result.requests
    good = (log.rejected == SERVED) & ~np.isnan(log.finish_s)
    for metric in dict.fromkeys(one.metric for one in objectives if one.metric != "itl"):
        bound_s = max(one.bound_s for one in objectives if one.metric == metric)
        times = _times_s(metric, log)
        good &= np.isnan(times) | (times <= bound_s)
    count, makespan_s = int(np.count_nonzero(good)), result.summary["makespan_s"]
    tokens = int(log.output_tokens[good].sum())
    return Goodput(
        requests=count,
        request_share=count / len(good),
        requests_per_s=count / makespan_s if makespan_s else 0.0,
        tokens_per_s=tokens / makespan_s if makespan_s else 0.0,
    )


def _times_s(metric: str, log: RequestLog) -> np.ndarray:
    """float64 [n]: infinite of a rejected request, NaN of one that has no such time."""
    times = {"ttft": log.ttft_s, "tpot": log.tpot_s, "e2e": log.finish_s - log.arrival_s, "queue": log.queue_s}[metric]
    return np.where(log.rejected == SERVED, times, np.inf)


def _percentile(times_s: np.ndarray, percentile: float) -> float | None:
    """NumPy's linear percentile of the times that there are: 0 of none, as then none is late; None of an infinite
    one."""
    known = np.sort(times_s[~np.isnan(times_s)])
    if not len(known):
        return 0.0
    place = percentile / 100 * (len(known) - 1)
    if np.isinf(known[int(np.ceil(place))]):
        return None
    return float(np.percentile(known, percentile))
