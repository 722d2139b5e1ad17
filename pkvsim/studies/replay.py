"""Replays a trace on a model of a GPU: what every engine would do and cost, step by step."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import OWN_ROUTES
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.choose import PINNED_ROUTES
from pkvsim.policy.decision import Decision, Policy
from pkvsim.policy.paper import PAPER_ROUTES, PAPER_TILE_TOKENS, PaperPolicy
from pkvsim.pricing.counters import MIB, StepCounters, flashinfer_counters, schedule_counters
from pkvsim.schedule.make import make_schedule
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int
from pkvsim.timeline.timeline import route_schedule
from pkvsim.traces.paper_families import Trace, pool_pages

# Engines by the route they take. The paper's FlashInfer ran with tensor cores on, and keeps its name.
ENGINES = {
    "flashinfer_tensor_core": "flashinfer", "split": "split", "workqueue": "workqueue", "balanced": "balanced",
    "flashinfer_cuda_core": "flashinfer_cuda_core", "xqa": "xqa",
}  # fmt: skip


@dataclass(slots=True)
class _Totals:
    """Running counters of one engine."""

    steps: list[tuple[StepCounters, float, float]] = field(default_factory=list)  # counters, predicted us, host's part

    def means(self, *, with_host: bool) -> dict[str, float]:
        def mean(values: list[float]) -> float:
            return float(np.mean(values))

        counters = [c for c, _, _ in self.steps]
        figures = {
            "launches_per_step": mean([c.launches for c in counters]),
            "merge_launches_per_step": mean([c.merge_launches for c in counters]),
            "cta_work_per_sm": mean([c.cta_work_per_sm for c in counters]),
            "useful_kv_mib": mean([c.useful_kv_bytes / MIB for c in counters]),
            "merge_mib": mean([c.merge_bytes / MIB for c in counters]),
            "nonempty_cta_fraction": mean([c.nonempty_cta_fraction for c in counters]),
            "predicted_step_us": mean([us for _, us, _ in self.steps]),
        }
        if not with_host:
            return figures
        host_us = mean([us for _, _, us in self.steps])
        return figures | {"predicted_gpu_us": figures["predicted_step_us"] - host_us, "predicted_host_us": host_us}


def route_counters(
    route: str, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, policy: Policy,
    options: AttentionOptions = PLAIN,
) -> StepCounters:  # fmt: skip
    """What one step does on a route, with the policy's split counts."""
    if route not in OWN_ROUTES:
        return flashinfer_counters(shape, seq_lens, device, options)
    if isinstance(policy, PaperPolicy):
        splits = policy.split_counts(route, shape, seq_lens)
        schedule = make_schedule(route, shape, seq_lens, splits=splits, tile_tokens=PAPER_TILE_TOKENS)
    else:
        model = device_routes(device)[route]
        tile = int(model.tile_tokens)
        if route in PINNED_ROUTES:
            splits = policy.split_counts(route, shape, seq_lens, device, options=options)  # type: ignore[attr-defined]
            schedule = make_schedule(route, shape, seq_lens, splits=splits, tile_tokens=tile, window=options.reach)
        else:
            schedule = route_schedule(model, shape, seq_lens, num_sms=device.num_sms, options=options)
    return schedule_counters(schedule, shape, seq_lens, device, options)


def _engines(policy: Policy, decision: Decision) -> dict[str, str]:
    """Engine name by route, of every route that the policy prices."""
    if isinstance(policy, PaperPolicy):
        return {route: route for route in PAPER_ROUTES}
    return {route: name for route, name in ENGINES.items() if route in decision.prices}


def replay(
    trace: Trace, shape: DecodeShape, device: DeviceSpec, policy: Policy, *, hole_fraction: float = 0.0,
    layers: int = 1, options: AttentionOptions = PLAIN,
) -> dict[str, Any]:  # fmt: skip
    """Every engine over the trace's measured steps, as the object that `pkvsim replay --json` prints.

    Engine figures are means over the steps; times in us, of a step of `layers` attention layers planned once:
    predicted_step_us by the wall clock, predicted_gpu_us by CUDA events around the layers on a GPU that never waits,
    and predicted_host_us what lies between (where the device's constants tell them apart). "adaptive" takes the
    policy's route at each step. options: of every layer's attention; engines that do not serve them are left out, and
    with query_tokens the rows decode one token a step all the same, as if every draft but its first token were refused.
    Raises ValueError naming the argument, when shape and trace disagree on the page size, or the policy knows no
    options.
    """
    layers = check_int("layers", layers, 1, MAX_TOKENS)
    if shape.page_size != trace.page_size:
        raise ValueError(f"trace: expected page_size {shape.page_size}, got {trace.page_size}")
    totals: dict[str, _Totals] = {}
    routes: dict[str, int] = {}
    active: list[int] = []
    distinct: list[int] = []
    adaptive = _Totals()
    for step in trace.iter_steps():
        decision = policy.decide(shape, step.seq_lens, device, layers=layers, options=options)
        for route, engine in _engines(policy, decision).items():
            counters = route_counters(route, shape, step.seq_lens, device, policy, options)
            outcome = (counters, decision.prices[route], decision.host_us.get(route, 0.0))
            totals.setdefault(engine, _Totals()).steps.append(outcome)
            routes.setdefault(engine, 0)
            if route == decision.route:
                adaptive.steps.append(outcome)
                routes[engine] += 1
        active.append(len(step.seq_lens))
        distinct.append(len(np.unique(step.seq_lens)))
    with_host = not isinstance(policy, PaperPolicy)
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
        "policy": policy.name,
        "engines": {name: each.means(with_host=with_host) for name, each in (totals | {"adaptive": adaptive}).items()},
    }
    report["engines"]["adaptive"]["routes"] = routes
    return report
