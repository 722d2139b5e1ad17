"""What a simulated run gave: its logs, its sums, and its summary."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pkvsim.devices.route_model import ROUTES
from pkvsim.memory.prefix_cache import ALLOCATED, EVICTABLE_PAGES, EVICTED, FREED
from pkvsim.memory.tier_options import TierSetup
from pkvsim.outside.step_costs import PARTS
from pkvsim.serving.results.logs import RequestLog, StepLog, StepSample, in_order, request_log, step_log, step_sample
from pkvsim.serving.results.summary import percentiles, replica_summary, summarise
from pkvsim.serving.selection.pages import selection_summary
from pkvsim.serving.shared.grouping import sharing_summary
from pkvsim.serving.state import DECODE_STEPS, LOG_COLUMNS, SERVED, Limits, Requests, RunLog, SchedulerState
from pkvsim.serving.tiers.tier_result import TierResult, make_tier_result, tier_summary
from pkvsim.serving.tiers.tier_server import TierLog


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
    parts = [step_log(log) for log in logs]
    requests, steps = request_log(work, states, owner), in_order(parts)
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
        replica_summary(requests, owner == at, part, limits, summary["makespan_s"]) for at, part in enumerate(parts)
    ]
    return ServingResult(
        policy=policy,
        requests=requests,
        steps=steps,
        sample=step_sample(logs),
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
