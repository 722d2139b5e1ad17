"""A run in figures: percentiles, rates and shares, of all servers and of each."""
from __future__ import annotations

from typing import Any

import numpy as np

from pkvsim.serving.results.logs import RequestLog, StepLog
from pkvsim.serving.state import (
    GAP_BINS,
    GAPS_PER_E,
    SERVED,
    TOO_LONG_FOR_MODEL,
    TOO_LONG_FOR_POOL,
    Limits,
    Requests,
)  # fmt: skip

PERCENTILES = (50, 90, 99)
# is_saturated in short
SATURATED = "hardly ever without work, and requests wait ever longer, or half of them longer than they then take"
SATURATED_SLOPE = 0.05  # seconds that the wait grows by per second of arrivals
SATURATED_SHARE = 0.75  # of a run that servers have work; those that are idle for longer could do more


def replica_summary(
    requests: RequestLog, own: np.ndarray, steps: StepLog, limits: Limits, makespan_s: float
) -> dict[str, Any]:
    """One server's part of a run."""
    weight = steps.duration_us * steps.steps
    busy_us = float(weight.sum())
    own = own & (requests.rejected == SERVED)
    return {
        "requests": int(own.sum()),
        "output_tokens": int(requests.output_tokens[own].sum()),
        "busy_share": busy_us / 1e6 / makespan_s if makespan_s else None,
        "mean_rows": dot(steps.rows, weight) / busy_us if busy_us else None,
        "kv_occupancy": dot(steps.pages, weight) / limits.num_pages / busy_us if busy_us else None,
        "preemptions": int(requests.preemptions[own].sum()),
        "prefix_hit_tokens": int(requests.hit_tokens[own].sum()),
        "ttft_s": percentiles(requests.ttft_s[own]),
    }


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """The sum of products, one thread's: BLAS would wake as many as there are cores, whose number decides the last
    digits, and who then spin beside the next run."""
    return float((a * b).sum())


def percentiles(values: np.ndarray) -> dict[str, float | None]:
    """p50, p90, p99 of values that are not NaN; None where there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {f"p{p}": None for p in PERCENTILES}
    return {f"p{p}": float(np.percentile(known, p)) for p in PERCENTILES}


def gap_percentiles(gaps: np.ndarray) -> dict[str, float | None]:
    """p50, p90, p99 in seconds of the times between tokens that RunLog.gaps counts, within a quarter of a percent."""
    return {f"p{p}": gap_percentile(gaps, p) for p in PERCENTILES}


def count_gaps(times_us: np.ndarray) -> np.ndarray:
    """Times between tokens in the bins of RunLog.gaps: int64 [GAP_BINS]."""
    bins = (np.log(np.maximum(times_us, 1.0)) * GAPS_PER_E).astype(np.int64)
    return np.bincount(np.minimum(bins, GAP_BINS - 1), minlength=GAP_BINS)


def gap_percentile(gaps: np.ndarray, percentile: float) -> float | None:
    """One of them; None where nothing was counted."""
    total = int(gaps.sum())
    if not total:
        return None
    at = np.searchsorted(np.cumsum(gaps), np.ceil(total * percentile / 100))
    return float(np.exp((at + 0.5) / GAPS_PER_E) / 1e6)


def is_saturated(requests: RequestLog) -> bool:
    """Whether requests came faster than they could be served, through most of the run.

    A queue offered 1 + x times what it can serve waits x seconds longer for each second of arrivals. Saturated: the
    servers had work for at least SATURATED_SHARE of the run, and half of the requests waited longer for admission than
    half of them then took, or the least-squares slope of the wait is at least SATURATED_SLOPE and the last quarter of
    the requests waited longer than they then took; or all came at one instant, and some had to wait. Bursts that a
    server works off, to be idle until the next, are no saturation however long half of the requests waited in them:
    objectives on the waits are what bounds those.
    """
    arrival, wait, finish = _served_times(requests)
    if not len(arrival):
        return False
    if arrival[-1] <= arrival[0]:
        return bool(wait.max() > 0)
    if work_share(requests) < SATURATED_SHARE:
        return False
    if _half_longer(arrival, wait, finish):
        return True
    if len(arrival) < 8:
        return False
    centred = arrival - arrival.mean()
    slope = dot(centred, wait) / dot(centred, centred)
    last = slice(-(len(arrival) // 4), None)
    service = (finish - arrival - wait)[last].mean()
    return slope >= SATURATED_SLOPE and float(wait[last].mean()) > float(service)


def half_wait_longer(requests: RequestLog) -> bool:
    """Whether half of the requests waited longer for admission than half of them then took."""
    arrival, wait, finish = _served_times(requests)
    return bool(len(arrival)) and _half_longer(arrival, wait, finish)


def work_share(requests: RequestLog) -> float:
    """Part of the time from the first request of all to the last token of a server in which that server has requests
    that are unfinished: the mean over the requests, each counting its own server. NaN where none is served."""
    served = requests.rejected == SERVED
    columns = (requests.arrival_s, requests.finish_s, requests.replica)
    arrival, finish, replica = (column[served] for column in columns)
    first_s, shares = requests.arrival_s.min(initial=np.inf), np.zeros(len(arrival))
    for server in np.unique(replica):
        own = np.flatnonzero(replica == server)
        own = own[np.argsort(arrival[own], kind="stable")]
        until_s = np.maximum.accumulate(finish[own])
        from_s = np.maximum(arrival[own], np.concatenate([[first_s], until_s[:-1]]))  # before it others had work
        shares[own] = np.maximum(until_s - from_s, 0).sum() / (until_s[-1] - first_s)
    return float(shares.mean()) if len(shares) else float("nan")


def _half_longer(arrival: np.ndarray, wait: np.ndarray, finish: np.ndarray) -> bool:
    return bool(np.median(wait) > np.median(finish - arrival - wait))


def _served_times(requests: RequestLog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(arrival, wait, finish) of the requests that were served, seconds, in order of arrival."""
    served = requests.rejected == SERVED
    order = np.argsort(requests.arrival_s[served], kind="stable")  # what follows others is sent out of trace order
    return requests.arrival_s[served][order], requests.queue_s[served][order], requests.finish_s[served][order]


def summarise(
    requests: RequestLog, steps: StepLog, totals: dict[str, float], parts: dict[str, float], routes: dict[str, int],
    limits: Limits, work: Requests, gaps: np.ndarray, replicas: int, decode_steps: int,
) -> dict[str, Any]:  # fmt: skip
    """What `pkvsim whatif --json` prints of a run. totals, routes, gaps: as ServingResult has them."""
    served = requests.rejected == SERVED
    output_tokens, finished = int(requests.output_tokens.sum()), int(np.count_nonzero(~np.isnan(requests.finish_s)))
    makespan_s = float(np.nanmax(requests.finish_s)) if finished else 0.0
    busy_us, num_steps = totals["duration_us"], int(steps.steps.sum())
    best_us = totals["best_attention_us"]
    blocks = int(np.diff(work.blocks.offsets)[served].sum())
    weight = steps.duration_us * steps.steps  # us of each entry
    routes_taken = any(routes.values())
    # A prompt's last chunk gives a token, also where it is computed again.
    decoded = output_tokens - finished - int(requests.preemptions.sum())

    def share(part: float, whole: float) -> float | None:
        return float(part / whole) if whole else None

    return {
        "requests": len(served),
        "finished": finished,
        "rejected_too_long_for_pool": int(np.count_nonzero(requests.rejected == TOO_LONG_FOR_POOL)),
        "rejected_too_long_for_model": int(np.count_nonzero(requests.rejected == TOO_LONG_FOR_MODEL)),
        "output_tokens": output_tokens,
        "makespan_s": makespan_s,
        "tokens_per_s": share(output_tokens, makespan_s),
        "requests_per_s": share(finished, makespan_s),
        "busy_share": share(busy_us / 1e6, replicas * makespan_s),
        "ttft_s": percentiles(requests.ttft_s),
        "tpot_s": percentiles(requests.tpot_s),
        "itl_s": gap_percentiles(gaps),
        "e2e_s": percentiles(requests.e2e_s),
        "queue_s": percentiles(requests.queue_s),
        "tokens_per_decode_row": share(decoded, totals["decode_rows"]) if limits.query_tokens > 1 else None,
        "steps": num_steps,
        "step_us": share(busy_us, num_steps),
        "mean_rows": share(dot(steps.rows, weight), busy_us),
        "attention_share": share(totals["attention_us"], busy_us),
        "rest_share": share(totals["rest_us"], busy_us),
        "prefill_share": share(totals["prefill_us"], busy_us),
        "part_shares": {name: share(us, busy_us) for name, us in parts.items()},
        "attention_us_per_decode_step": share(totals["attention_us"], decode_steps),
        "routes": {name: count for name, count in routes.items() if count},
        "regret": share(totals["attention_us"] - best_us, best_us) if routes_taken else None,
        "kv_pages": replicas * limits.num_pages,
        "kv_occupancy": share(dot(steps.pages, weight) / limits.num_pages, busy_us),
        "preemptions": int(requests.preemptions.sum()),
        "prefix_hit_share": share(requests.hit_blocks.sum(), blocks),
        "prefix_hit_tokens": int(requests.hit_tokens.sum()),
        "saturated": is_saturated(requests),
    }
