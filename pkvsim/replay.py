"""Replays a trace on a model of a GPU: what every engine would do and cost, step by step."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pkvsim.cost import MIB, StepCounters, flashinfer_counters, schedule_counters
from pkvsim.device import DeviceSpec
from pkvsim.policy import PAPER_ROUTES as ROUTES
from pkvsim.policy import PAPER_TILE_TOKENS, PaperPolicy
from pkvsim.schedule import make_schedule
from pkvsim.shapes import DecodeShape
from pkvsim.traces import Trace, pool_pages


@dataclass(slots=True)
class _Totals:
    """Running counters of one engine."""

    steps: list[tuple[StepCounters, float]] = field(default_factory=list)  # counters, predicted us

    def means(self) -> dict[str, float]:
        def mean(values: list[float]) -> float:
            return float(np.mean(values))

        counters = [c for c, _ in self.steps]
        return {
            "launches_per_step": mean([c.launches for c in counters]),
            "merge_launches_per_step": mean([c.merge_launches for c in counters]),
            "cta_work_per_sm": mean([c.cta_work_per_sm for c in counters]),
            "useful_kv_mib": mean([c.useful_kv_bytes / MIB for c in counters]),
            "merge_mib": mean([c.merge_bytes / MIB for c in counters]),
            "nonempty_cta_fraction": mean([c.nonempty_cta_fraction for c in counters]),
            "predicted_step_us": mean([us for _, us in self.steps]),
        }


def route_counters(
    route: str, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, policy: PaperPolicy
) -> StepCounters:
    """What one step does on a route, with the policy's split counts."""
    if route == "flashinfer":
        return flashinfer_counters(shape, seq_lens, device)
    splits = policy.split_counts(route, shape, seq_lens)
    schedule = make_schedule(route, shape, seq_lens, splits=splits, tile_tokens=PAPER_TILE_TOKENS)
    return schedule_counters(schedule, shape, seq_lens, device)


def replay(
    trace: Trace, shape: DecodeShape, device: DeviceSpec, policy: PaperPolicy, *, hole_fraction: float = 0.0
) -> dict[str, Any]:
    """Every engine over the trace's measured steps, as the object that `pkvsim replay --json` prints.

    Engine figures are means over the steps; times in us. "adaptive" takes the policy's route at each
    step. Raises ValueError when shape and trace disagree on the page size.
    """
    if shape.page_size != trace.page_size:
        raise ValueError(f"trace: expected page_size {shape.page_size}, got {trace.page_size}")
    engines = {name: _Totals() for name in (*ROUTES, "adaptive")}
    routes = dict.fromkeys(ROUTES, 0)
    active: list[int] = []
    distinct: list[int] = []
    for step in trace.iter_steps():
        decision = policy.decide(shape, step.seq_lens, device)
        for route in ROUTES:
            outcome = (route_counters(route, shape, step.seq_lens, device, policy), decision.prices[route])
            engines[route].steps.append(outcome)
            if route == decision.route:
                engines["adaptive"].steps.append(outcome)
        routes[decision.route] += 1
        active.append(len(step.seq_lens))
        distinct.append(len(np.unique(step.seq_lens)))
    report: dict[str, Any] = {
        "trace": {
            "family": trace.family,
            "seed": trace.seed,
            "requests": trace.num_requests,
            "max_active": trace.max_active,
            "steps": len(active),
            "physical_pages": pool_pages(trace, hole_fraction),
            "mean_active": float(np.mean(active)),
            "distinct_lengths_mean": float(np.mean(distinct)),
            "decode_tokens": sum(active),
        },
        "device": device.name,
        "policy": "paper",
        "engines": {name: totals.means() for name, totals in engines.items()},
    }
    report["engines"]["adaptive"]["routes"] = routes
    return report
