"""Runs one trace on every engine: checks each result, times each step, and keeps the figures as plain data."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from serving.check import TOLERANCE, float64_error, layer_caches
from serving.engines import ADAPTIVE, BACKENDS, EngineSet, StepInputs, decide, make_step, own_counters
from serving.measure import StepTimer

from gpu.measure.timing import StreamLimit, l2_bytes, rotation_length, shared_stream
from pkvsim.pricing.counters import MIB, StepCounters, flashinfer_counters, useful_kv_bytes
from pkvsim.traces.paper_families import Trace, TraceStep, assign_pages

if TYPE_CHECKING:
    import torch

    from gpu.measure.pools import BenchPool
    from pkvsim.devices.device import DeviceSpec
    from pkvsim.policy.by_name import CalibratedPolicy

FLOAT64_STEPS = 3  # steps of a trace whose results are compared with float64


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What outlives a trace."""

    pool: BenchPool
    limit: StreamLimit
    device: DeviceSpec
    policy: CalibratedPolicy
    dtype: str
    layers: int
    repeats: int
    stride: int
    hole_fraction: float
    pinned: dict[str, int]  # splits of split and workqueue that the command line fixes


class TracePages:
    """A trace's page tables and the layers' caches that they point into."""

    __slots__ = ("trace", "assignment", "caches", "_width")

    def __init__(self, bench: Bench, engines: EngineSet, trace: Trace, *, rotate: bool) -> None:
        """rotate: as many caches as keep the L2 cold from one call to the next; else one, for a flushed L2."""
        self.trace = trace
        self.assignment = assign_pages(trace, hole_fraction=bench.hole_fraction)
        least = min(useful_kv_bytes(engines.shape, step.seq_lens) for step in trace.iter_steps())
        wanted = max(2, rotation_length(least, l2_size=l2_bytes())) if rotate else 1
        self.caches = layer_caches(bench.pool, engines.shape, self.assignment.num_pages, wanted=wanted)
        self._width = int(trace.reserved_pages().max())

    def step(self, bench: Bench, engines: EngineSet, trace_step: TraceStep) -> StepInputs:
        owned = self.assignment.block_table(trace_step.request_ids)
        table = np.full((len(owned), self._width), -1, np.int32)
        table[:, : owned.shape[1]] = owned
        splits = step_splits(bench, engines, trace_step.seq_lens)
        return make_step(engines.shape, trace_step.seq_lens, table, splits, dtype=bench.pool.flat.dtype)


def step_splits(bench: Bench, engines: EngineSet, seq_lens: np.ndarray) -> dict[str, np.ndarray | None]:
    """Splits of split and workqueue: those of the command line, else the policy's own for that route."""
    found: dict[str, np.ndarray | None] = {}
    for route in ("split", "workqueue"):
        if route in bench.pinned:
            found[route] = np.full(len(seq_lens), bench.pinned[route], np.int64)
        else:
            found[route] = bench.policy.split_counts(route, engines.shape, seq_lens, bench.device)
    return found


def run_trace(bench: Bench, engines: EngineSet, trace: Trace, *, label: str) -> dict[str, object]:
    """Every step of the trace (every stride-th) on every engine, as the object that the JSON keeps.

    Raises RuntimeError when one of our engines' results is wrong; an engine of FlashInfer's with another result is
    named under "wrong" and not timed.
    """
    pages = TracePages(bench, engines, trace, rotate=bench.layers > 1)
    steps = list(trace.iter_steps())[:: bench.stride]
    timer = StepTimer(bench.limit, layers=bench.layers, repeats=bench.repeats)
    sampled = set(np.linspace(0, len(steps) - 1, FLOAT64_STEPS).astype(int).tolist())
    router = engines.engines[ADAPTIVE].router if ADAPTIVE in engines.engines else None
    record: dict[str, object] = {
        "label": label,
        "family": trace.family,
        "seed": trace.seed,
        "layers": bench.layers,
        "caches": len(pages.caches),
        "shape": asdict(engines.shape),
        "max_active": trace.max_active,
        "physical_pages": pages.assignment.num_pages,
        "left_out": engines.left_out,
        "wrong": {},
        "baseline": engines.baseline,
        "active": [],
        "kv_mib": [],
        "decisions": [],
        "prices": {},
        "model_host_us": {},
        "engines": {},
        "counters": {},
    }
    counters: dict[str, list[StepCounters]] = {}
    with shared_stream():
        for index, trace_step in enumerate(steps):
            step = pages.step(bench, engines, trace_step)
            _check(bench, engines, step, pages.caches[0], record, float64=index in sampled)
            runnable = [engine for name, engine in engines.engines.items() if name not in record["wrong"]]
            for name, times in timer.measure(runnable, step, pages.caches, step.q.clone()).items():
                row = record["engines"].setdefault(name, {"event_us": [], "wall_us": [], "plan_us": []})
                for key, value in asdict(times).items():
                    row[key].append(round(value, 2))
            record["active"].append(len(step.seq_lens))
            record["kv_mib"].append(round(useful_kv_bytes(engines.shape, step.seq_lens) / MIB, 2))
            for name in engines.routes:
                counters.setdefault(name, []).append(step_counters(bench, engines, name, step))
            if router is not None:
                decision = decide(router, step.seq_lens)
                record["decisions"].append(decision.route)
                for route, price in decision.prices.items():
                    record["prices"].setdefault(route, []).append(round(price, 2))
                    record["model_host_us"].setdefault(route, []).append(round(decision.host_us[route], 2))
    for name in record["wrong"]:
        record["engines"].pop(name, None)
    record["counters"] = {name: mean_counters(found) for name, found in counters.items()}
    if not record["engines"]:
        raise RuntimeError(f"{label} {trace.family}: no engine gave the right result: {record['wrong']}")
    return record


def _check(
    bench: Bench,
    engines: EngineSet,
    step: StepInputs,
    cache: tuple[torch.Tensor, torch.Tensor],
    record: dict,
    *,
    float64: bool,
) -> None:
    """Compares every engine with the baseline engine, and with float64 on sampled steps and wherever two differ; notes
    the largest errors. Raises RuntimeError when ours is wrong; FlashInfer's is named under "wrong" instead."""
    import torch

    limit, expected, expected_from = TOLERANCE[bench.dtype], None, ""
    order = [engines.baseline, *(name for name in engines.engines if name != engines.baseline)]
    for name in (name for name in order if name not in record["wrong"]):
        out = torch.full_like(step.q, float("nan"))
        engines.engines[name].plan(step)
        engines.engines[name].run(step, *cache, out)
        torch.cuda.synchronize()
        found = {}
        if expected is not None:
            found["difference"] = float((out.float() - expected.float()).abs().max())
        differs = not found.get("difference", 0.0) < limit  # NaN too
        if float64 or differs:
            found["float64_error"] = float64_error(step, out, *cache)
            wrong = not found["float64_error"] < limit
            if wrong or differs:
                culprit = name if wrong or expected_from not in BACKENDS else expected_from
                said = f"{found} with lengths {step.seq_lens.tolist()}"
                if culprit not in BACKENDS:
                    raise RuntimeError(f"{culprit}: {said}")
                record["wrong"][culprit] = said
                if culprit == name:
                    continue
                expected = None
                found.pop("difference")  # the other engine's
        if expected is None:
            expected, expected_from = out, name
        errors = record.setdefault("errors", {}).setdefault(name, {})
        for key, value in found.items():
            errors[key] = max(errors.get(key, 0.0), value)


def step_counters(bench: Bench, engines: EngineSet, route: str, step: StepInputs) -> StepCounters:
    """What the schedule that this engine just ran does."""
    if route in BACKENDS:
        return flashinfer_counters(engines.shape, step.seq_lens, bench.device)
    return own_counters(engines, route, step.seq_lens, step.splits.get(route), device=bench.device)


def mean_counters(counters: list[StepCounters]) -> dict[str, float]:
    """Mean of every counter over the steps."""
    rows = [asdict(one) for one in counters]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
