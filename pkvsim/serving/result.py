"""What a simulated run gave: per request, per step, and in sum."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from pkvsim.devices.route_model import ROUTES
from pkvsim.memory.prefix_cache import ALLOCATED, EVICTABLE_PAGES, EVICTED, FREED
from pkvsim.memory.tier_options import TierSetup
from pkvsim.outside.step_costs import PARTS
from pkvsim.serving.selection.pages import selection_summary
from pkvsim.serving.shared.grouping import sharing_summary
from pkvsim.serving.state import (
    ATTENTION,
    BEST,
    DECODE_ROWS,
    DECODE_STEPS,
    DURATION,
    GAP_BINS,
    GAPS_PER_E,
    LOG_COLUMNS,
    LOG_FILL,
    LOG_STRIDE,
    LOG_USED,
    PAGES,
    PREFILL,
    PREFILL_TOKENS,
    REST,
    ROW_COUNT,
    SAMPLES,
    SAMPLES_USED,
    SERVED,
    START,
    TOO_LONG_FOR_MODEL,
    TOO_LONG_FOR_POOL,
    WAITING_COUNT,
    Limits,
    Requests,
    RunLog,
    SchedulerState,
)  # fmt: skip
from pkvsim.serving.tiers.tier_result import TierResult, make_tier_result, tier_summary
from pkvsim.serving.tiers.tier_server import TierLog

PERCENTILES = (50, 90, 99)
SATURATED_SLOPE = 0.05  # seconds that the wait grows by per second of arrivals


@dataclass(frozen=True, slots=True, eq=False)
class RequestLog:
    """One entry a request [n], in trace order; NaN where it was rejected. Times are seconds from the first arrival."""

    arrival_s: np.ndarray  # float64, when it was sent, which may be later than the trace has it
    queue_s: np.ndarray  # float64, from then to first admission
    ttft_s: np.ndarray  # float64, from then to the first output token
    tpot_s: np.ndarray  # float64, mean time between output tokens; NaN where there is one token
    finish_s: np.ndarray  # float64
    prompt_tokens: np.ndarray  # int64
    output_tokens: np.ndarray  # int64, tokens produced
    hit_tokens: np.ndarray  # int64, prompt tokens that need no prefill, at first admission
    hit_blocks: np.ndarray  # int32
    preemptions: np.ndarray  # int32
    rejected: np.ndarray  # int8, 0 or serving_state.TOO_LONG_FOR_POOL, TOO_LONG_FOR_MODEL
    replica: np.ndarray  # int64, the server that it ran on

    @property
    def e2e_s(self) -> np.ndarray:
        """From sending to the last token, float64 [n]."""
        return self.finish_s - self.arrival_s


@dataclass(frozen=True, slots=True, eq=False)
class StepLog:
    """Runs of `steps` consecutive steps [m]; one step each until there are more than 65,536, means over them after."""

    start_s: np.ndarray  # float64, from the first arrival
    steps: np.ndarray  # int64, steps of the entry
    duration_us: np.ndarray  # float64, all from here on are means over the entry's steps
    rows: np.ndarray  # float64, running requests
    decode_rows: np.ndarray  # float64, requests past prefill, of one output token each but where drafts are checked
    prefill_tokens: np.ndarray  # float64
    waiting: np.ndarray  # float64, requests that have arrived and do not run
    pages: np.ndarray  # float64, KV pages in use
    attention_us: np.ndarray  # float64, decode attention
    rest_us: np.ndarray  # float64, the rest of the layers, had the step been without prefill
    prefill_us: np.ndarray  # float64, what prefill added
    best_attention_us: np.ndarray  # float64, decode attention on the cheapest route of each step
    route_steps: np.ndarray  # [m, len(ROUTES)] float64, steps of the entry on each route


@dataclass(frozen=True, slots=True, eq=False)
class StepSample:
    """Up to 64 decode steps [k], evenly spread over the run's."""

    lens: np.ndarray  # [k, max_batch] int64, tokens in cache of the first `rows`, longest first
    rows: np.ndarray  # [k] int64
    route: np.ndarray  # [k] int64, of the full-attention layers, index into ROUTES
    splits: np.ndarray  # [k] int64, splits of every row, 0 where the route's own rule chose

    def steps(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """(lens [rows] int32, route, splits) of each step."""
        for lens, rows, route, splits in zip(self.lens, self.rows, self.route, self.splits):
            yield lens[:rows].astype(np.int32), int(route), int(splits)


@dataclass(frozen=True, slots=True, eq=False)
class ServingResult:
    """A run of one policy. summary is what `pkvsim whatif --json` prints for it."""

    policy: str
    requests: RequestLog
    steps: StepLog
    sample: StepSample
    num_pages: int
    page_size: int
    allocated_pages: int  # over the run, equal to freed_pages + cached_pages
    freed_pages: int
    cached_pages: int  # blocks that the prefix cache still holds at the end
    evicted_blocks: int
    totals: dict[str, float]  # sums over all steps, by LOG_COLUMNS
    routes: dict[str, int]  # decode steps by route of the full-attention layers
    gaps: np.ndarray  # int64, times between a request's tokens, counted as state.RunLog does
    summary: dict[str, Any]
    tiers: TierResult | None = None  # where the server had any


def with_tiers(result: ServingResult, setup: TierSetup, log: TierLog) -> ServingResult:
    """The result of a run with what its tiers did."""
    requests = result.requests
    tiers = make_tier_result(setup.tiers, log, queue_s=requests.queue_s, ttft_s=requests.ttft_s)
    served = int(requests.prompt_tokens[requests.rejected == SERVED].sum())
    summary = tier_summary(tiers, served, result.summary["makespan_s"], percentiles)
    return replace(result, tiers=tiers, summary=result.summary | {"tiers": summary})


def make_result(
    policy: str, work: Requests, limits: Limits, states: Sequence[SchedulerState], logs: Sequence[RunLog],
    owner: np.ndarray,
) -> ServingResult:  # fmt: skip
    """Copies what a finished run left behind into plain arrays. owner [n] int64: the server of each request."""
    parts = [_step_log(log) for log in logs]
    requests, steps = _request_log(work, states, owner), _in_order(parts)
    totals = dict(zip(LOG_COLUMNS, np.sum([log.totals for log in logs], axis=0).tolist()))
    routes = dict(zip(ROUTES, np.sum([log.route_steps for log in logs], axis=0).tolist()))
    counts = np.sum([state.pool.counts for state in states], axis=0)
    gaps = np.sum([log.gaps for log in logs], axis=0)
    decode_steps = int(np.sum([log.counts[DECODE_STEPS] for log in logs]))
    part_us = dict(zip(PARTS, np.sum([log.part_totals for log in logs], axis=0).tolist()))
    summary = summarise(requests, steps, totals, part_us, routes, limits, work, gaps, len(logs), decode_steps)
    groupings = [log.grouping for log in logs]
    summary["shared_reads"] = sharing_summary(groupings, totals["attention_us"], decode_steps)
    summary["selection"] = selection_summary([log.selected for log in logs], totals["attention_us"], decode_steps)
    summary["replicas"] = [
        _replica(requests, owner == at, part, limits, summary["makespan_s"]) for at, part in enumerate(parts)
    ]
    return ServingResult(
        policy=policy,
        requests=requests,
        steps=steps,
        sample=_sample(logs),
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        allocated_pages=int(counts[ALLOCATED]),
        freed_pages=int(counts[FREED]),
        cached_pages=int(counts[EVICTABLE_PAGES]),
        evicted_blocks=int(counts[EVICTED]),
        totals=totals,
        routes=routes,
        gaps=gaps,
        summary=summary,
    )


def _request_log(work: Requests, states: Sequence[SchedulerState], owner: np.ndarray) -> RequestLog:
    def column(name: str) -> np.ndarray:
        return np.stack([getattr(state, name) for state in states])[owner, np.arange(len(owner))]

    # As the client sees it: sent before the server's queue has it, answered after a step has ended.
    output, queued_us, late_us = column("generated"), states[0].clients.sent_us, work.output_us
    sent_us, first_us, finish_us = (
        queued_us - work.queue_us, column("first_token_us") + late_us, column("finish_us") + late_us,
    )  # fmt: skip
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot_s = (finish_us - first_us) / (output - 1) / 1e6
    return RequestLog(
        arrival_s=sent_us / 1e6,
        queue_s=(column("start_us") - sent_us) / 1e6,
        ttft_s=(first_us - sent_us) / 1e6,
        tpot_s=np.where(output > 1, tpot_s, np.nan),
        finish_s=finish_us / 1e6,
        prompt_tokens=work.prompt,
        output_tokens=output,
        hit_tokens=column("hit_tokens"),
        hit_blocks=column("hit_blocks"),
        preemptions=column("preemptions"),
        rejected=work.rejected,
        replica=owner,
    )


def _step_log(log: RunLog) -> StepLog:
    used = int(log.counts[LOG_USED])
    steps = np.full(used, log.counts[LOG_STRIDE], np.int64)
    if used:
        steps[-1] = log.counts[LOG_FILL]
    means = log.log[:used] / steps[:, None]
    return StepLog(
        start_s=log.log[:used, START] / 1e6,
        steps=steps,
        duration_us=means[:, DURATION],
        rows=means[:, ROW_COUNT],
        decode_rows=means[:, DECODE_ROWS],
        prefill_tokens=means[:, PREFILL_TOKENS],
        waiting=means[:, WAITING_COUNT],
        pages=means[:, PAGES],
        attention_us=means[:, ATTENTION],
        rest_us=means[:, REST],
        prefill_us=means[:, PREFILL],
        best_attention_us=means[:, BEST],
        route_steps=log.log_routes[:used].copy(),
    )


def _in_order(parts: Sequence[StepLog]) -> StepLog:
    """The steps of all servers by their starts."""
    if len(parts) == 1:
        return parts[0]
    columns = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(StepLog)}
    order = np.argsort(columns["start_s"], kind="stable")
    return StepLog(**{name: column[order] for name, column in columns.items()})


def _sample(logs: Sequence[RunLog]) -> StepSample:
    """Of several servers a share each."""
    parts = []
    for log in logs:
        used = int(log.counts[SAMPLES_USED])
        kept = np.linspace(0, used - 1, min(used, max(1, SAMPLES // len(logs)))).astype(int) if used else slice(0, 0)
        parts.append((log.sample_lens[kept], log.sample_choice[kept]))
    lens, choice = (np.concatenate(arrays) for arrays in zip(*parts))
    return StepSample(lens, *choice.T)


def _replica(
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
        "mean_rows": float(steps.rows @ weight / busy_us) if busy_us else None,
        "kv_occupancy": float(steps.pages @ weight / limits.num_pages / busy_us) if busy_us else None,
        "preemptions": int(requests.preemptions[own].sum()),
        "prefix_hit_tokens": int(requests.hit_tokens[own].sum()),
        "ttft_s": percentiles(requests.ttft_s[own]),
    }


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
    """Whether requests came faster than they could be served.

    A queue offered 1 + x times what it can serve waits x seconds longer for each second of arrivals. Saturated: half of
    the requests waited longer for admission than half of them then took; or the least-squares slope of the wait is at
    least SATURATED_SLOPE, and the last quarter of the requests waited longer than they then took; or all came at one
    instant, and some had to wait.
    """
    served = requests.rejected == SERVED
    order = np.argsort(requests.arrival_s[served], kind="stable")  # what follows others is sent out of trace order
    columns = (requests.arrival_s, requests.queue_s, requests.finish_s)
    arrival, wait, finish = (column[served][order] for column in columns)
    if not len(arrival):
        return False
    if arrival[-1] <= arrival[0]:
        return bool(wait.max() > 0)
    if np.median(wait) > np.median(finish - arrival - wait):
        return True
    if len(arrival) < 8:
        return False
    centred = arrival - arrival.mean()
    slope = float(centred @ wait / (centred @ centred))
    last = slice(-(len(arrival) // 4), None)
    service = (finish - arrival - wait)[last].mean()
    return slope >= SATURATED_SLOPE and float(wait[last].mean()) > float(service)


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
        "mean_rows": share(steps.rows @ weight, busy_us),
        "attention_share": share(totals["attention_us"], busy_us),
        "rest_share": share(totals["rest_us"], busy_us),
        "prefill_share": share(totals["prefill_us"], busy_us),
        "part_shares": {name: share(us, busy_us) for name, us in parts.items()},
        "attention_us_per_decode_step": share(totals["attention_us"], decode_steps),
        "routes": {name: count for name, count in routes.items() if count},
        "regret": share(totals["attention_us"] - best_us, best_us) if routes_taken else None,
        "kv_pages": replicas * limits.num_pages,
        "kv_occupancy": share(steps.pages @ weight / limits.num_pages, busy_us),
        "preemptions": int(requests.preemptions.sum()),
        "prefix_hit_share": share(requests.hit_blocks.sum(), blocks),
        "prefix_hit_tokens": int(requests.hit_tokens.sum()),
        "saturated": is_saturated(requests),
    }
