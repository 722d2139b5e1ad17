"""Steps and runs in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Times are microseconds, rounded to nanoseconds, so that what follows in a lane never begins before its predecessor's
end. Long runs are thinned to a bounded number of events; what was left out is in otherData.left_out.
"""
from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pkvsim.devices.route_model import ROUTES
from pkvsim.reports.plots import check_folder
from pkvsim.reports.tiers.lanes import lane_events, lane_names
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.tiers.tier_result import TierResult
from pkvsim.studies.step_report import RouteStep, StepReport
from pkvsim.studies.whatif import WhatIf

MAX_EVENTS = 150_000  # of a file, about 25 MB
STEPS_LANE = 1  # of a policy's process; its requests' lanes come after
TIER_LANES = 1_000_000  # devices' lanes come after those
TASK_PARTS = 3  # events of a task: itself, and a counter's change at each end
REQUEST_PARTS = 3  # events of a request: the whole, prefill, decode
STEP_PARTS = 5  # events of a step: itself, and four counters
_PARTS = ("attention_us", "rest_us", "prefill_us")


def check_timeline_path(path: str | Path) -> Path:
    """`path`, if a timeline can be written there; ValueError otherwise. Long work asks before it starts."""
    if Path(path).suffix.lower() != ".json":
        raise ValueError(f"timeline: expected a file ending in .json, got {str(path)!r}")
    check_folder(path, option="timeline")
    return Path(path)


def write_timeline(trace: dict[str, Any], path: str | Path) -> list[str]:
    """Writes what step_events or serving_events gave, and returns what it leaves out. ValueError as
    check_timeline_path, or where writing fails."""
    path = check_timeline_path(path)
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump(trace, file, separators=(",", ":"), allow_nan=False)
    except OSError as error:
        raise ValueError(f"timeline: cannot write {path}: {error.strerror or error}") from None
    return trace["otherData"]["left_out"]


def step_events(report: StepReport, *, max_events: int = MAX_EVENTS) -> dict[str, Any]:
    """A process a route, a lane a CTA slot, an event a task, and a counter of the tasks that run."""
    events, left_out = [], []
    for pid, route in enumerate(report.routes, 1):
        name = f"{route.route}{' (taken)' if route.route == report.taken else ''}: {route.timeline_us:,.1f} us"
        events += [_name("process_name", pid, 0, name), _sort("process_sort_index", pid, 0)]
        parts = route.to_dict()["time_us"]
        events += [_name("thread_name", pid, 0, "kernels"), _complete("decode", pid, 0, 0.0, route.timeline_us, parts)]
        tasks = len(route.timeline.schedule.tasks)
        kept = min(tasks, max_events // (TASK_PARTS * len(report.routes)))
        if kept < tasks:
            left_out.append(f"{route.route}: the {tasks - kept:,} tasks that start last of {tasks:,}")
        events += _tasks(route, pid, kept, report)
    about = {"device": report.device.label, "rows": len(report.seq_lens), "tokens": int(report.seq_lens.sum())}
    return _file(events, about, left_out)


def _tasks(route: RouteStep, pid: int, kept: int, report: StepReport) -> Iterable[dict[str, Any]]:
    line = route.timeline
    order = np.argsort(line.start_us, kind="stable")[:kept]
    for slot in np.unique(line.slot[order]).tolist():
        yield _name("thread_name", pid, slot + 1, f"CTA slot {slot}")
        yield _sort("thread_sort_index", pid, slot + 1)
    shared = line.schedule.shared
    for at in order.tolist():
        row, kv_head, split, begin, end = line.schedule.tasks[at].tolist()
        args = {"row": row, "kv_head": kv_head, "split": split, "tile_begin": begin, "tile_end": end}
        args |= {"row_tokens": int(report.seq_lens[row]), "kv_bytes": int(line.bytes[at])}
        name = f"row {row} head {kv_head}" + (f" split {split}" if split else "")
        if shared is not None and shared.read_of_task[at] >= 0:
            rows = shared.members_of(int(shared.read_of_task[at])).tolist()
            name, args["rows"] = f"{len(rows)} rows head {kv_head}" + (f" split {split}" if split else ""), rows
        yield _complete(name, pid, int(line.slot[at]) + 1, float(line.start_us[at]), float(line.end_us[at]), args)
    times = np.concatenate((line.start_us[order], line.end_us[order]))
    change = np.repeat((1, -1), len(order))
    by_time = np.argsort(times, kind="stable")
    running = np.cumsum(change[by_time])
    times = times[by_time]
    last = np.append(np.diff(times) > 0, True) if len(times) else np.zeros(0, bool)  # of the changes at one time
    for time_us, count in zip(times[last].tolist(), running[last].tolist()):
        yield _counter("running tasks", pid, time_us, {"tasks": count})


def serving_events(report: WhatIf, *, max_events: int = MAX_EVENTS) -> dict[str, Any]:
    """A process a policy: a lane of steps (by route), counters of requests, KV pages and where the time goes, and lanes
    in which requests run from admission to their last token, prefill and decode inside."""
    events: list[dict[str, Any]] = []
    left_out: list[str] = []
    share = max_events // len(report.results)
    for pid, result in enumerate(report.results.values(), 1):
        events += [_name("process_name", pid, 0, f"policy {result.policy}"), _sort("process_sort_index", pid, 0)]
        events += _steps(result, pid, share // 2 // STEP_PARTS, left_out)
        events += _requests(result, pid, share // 2 // REQUEST_PARTS, left_out)
        if result.tiers is not None:
            events += _tiers(result.policy, result.tiers, pid, share // 2, left_out)
    about = {"model": report.model.name, "device": report.device.label, "trace": report.trace.name}
    return _file(events, about | {"notes": list(report.notes)}, left_out)


def _steps(result: ServingResult, pid: int, most: int, left_out: list[str]) -> Iterable[dict[str, Any]]:
    steps = result.steps
    if not len(steps.start_s):
        return
    fold = -(-len(steps.start_s) // max(1, most))
    if fold > 1 or int(steps.steps[0]) > 1:
        many = fold * int(steps.steps[0])
        total = int(steps.steps.sum())
        left_out.append(f"{result.policy}: single steps, an event has the means of up to {many:,} of {total:,}")
    yield _name("thread_name", pid, STEPS_LANE, "steps, by route")
    yield _sort("thread_sort_index", pid, STEPS_LANE)
    first = np.arange(0, len(steps.start_s), fold)
    counts = np.add.reduceat(steps.steps, first)
    means = {
        name: np.add.reduceat(getattr(steps, name) * steps.steps, first) / counts
        for name in ("duration_us", "rows", "decode_rows", "prefill_tokens", "waiting", "pages", *_PARTS)
    }
    routes = np.add.reduceat(steps.route_steps, first, axis=0)
    starts_us = steps.start_s[first] * 1e6
    ends_us = np.minimum(starts_us + means["duration_us"] * counts, np.append(starts_us[1:], np.inf))
    for at, start_us in enumerate(starts_us.tolist()):
        route = ROUTES[int(routes[at].argmax())] if routes[at].any() else "prefill only"
        mean = {name: round(float(values[at]), 3) for name, values in means.items()}
        count = int(counts[at])
        name = route if count == 1 else f"{route} and others" if np.count_nonzero(routes[at]) > 1 else route
        yield _complete(name, pid, STEPS_LANE, start_us, float(ends_us[at]), {"steps": count} | mean)
        yield _counter("requests", pid, start_us, {"running": mean["rows"], "waiting": mean["waiting"]})
        yield _counter("KV pages in use", pid, start_us, {"pages": mean["pages"]})
        yield _counter("step, us", pid, start_us, {name.removesuffix("_us"): mean[name] for name in _PARTS})
        tokens = {"decode": mean["decode_rows"], "prefill": mean["prefill_tokens"]}
        yield _counter("tokens of a step", pid, start_us, tokens)
    end_us = float(ends_us[-1])
    for name, series in (("requests", ("running", "waiting")), ("KV pages in use", ("pages",))):
        yield _counter(name, pid, end_us, dict.fromkeys(series, 0))


def _requests(result: ServingResult, pid: int, most: int, left_out: list[str]) -> Iterable[dict[str, Any]]:
    log = result.requests
    finished = np.flatnonzero(~np.isnan(log.finish_s))
    stride = -(-len(finished) // max(1, most))
    if stride > 1:
        dropped = len(finished) - len(finished[::stride])
        left_out.append(f"{result.policy}: {dropped:,} of {len(finished):,} requests, one in {stride} is kept")
    kept = finished[::stride]
    if len(log.finish_s) > len(finished):
        left_out.append(f"{result.policy}: {len(log.finish_s) - len(finished):,} rejected requests")
    starts = _ns((log.arrival_s + log.queue_s)[kept] * 1e6)
    ends = _ns(log.finish_s[kept] * 1e6)
    firsts = np.clip(_ns((log.arrival_s + log.ttft_s)[kept] * 1e6), starts, ends)
    lanes = _lanes(starts, ends)
    for lane in range(lanes.max(initial=-1) + 1):
        tid = STEPS_LANE + 1 + lane
        yield _name("thread_name", pid, tid, f"requests, lane {lane}")
        yield _sort("thread_sort_index", pid, tid)
    for request, lane, start, first, end in zip(*(array.tolist() for array in (kept, lanes, starts, firsts, ends))):
        tid = STEPS_LANE + 1 + lane
        args = {
            "queue_s": float(log.queue_s[request]),
            "ttft_s": float(log.ttft_s[request]),
            "tpot_s": None if np.isnan(log.tpot_s[request]) else float(log.tpot_s[request]),
            "prompt_tokens": int(log.prompt_tokens[request]),
            "output_tokens": int(log.output_tokens[request]),
            "prefix_hit_tokens": int(log.hit_tokens[request]),
            "preemptions": int(log.preemptions[request]),
        }
        yield _span(f"request {request}", pid, tid, start, end, args)
        yield _span("prefill", pid, tid, start, first, {})
        yield _span("decode", pid, tid, first, end, {})


def _tiers(policy: str, tiers: TierResult, pid: int, most: int, left_out: list[str]) -> Iterable[dict[str, Any]]:
    """A lane for the reads and one for the writes of every device."""
    for lane, name in enumerate(lane_names(tiers)):
        yield _name("thread_name", pid, TIER_LANES + lane, name)
        yield _sort("thread_sort_index", pid, TIER_LANES + lane)
    work, dropped = lane_events(tiers, most)
    if dropped:
        left_out.append(f"{policy}: {dropped:,} reads and writes of tiers, evenly")
    for one in work:
        args = {"bytes": one.num_bytes}
        yield _complete(one.name, pid, TIER_LANES + one.lane, one.begin_us, one.end_us, args)


def _lanes(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A lane for each interval [n] int64, as few as can be, so that none overlap in a lane; int64 [n]."""
    lanes = np.zeros(len(starts), np.int64)
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    for at in np.argsort(starts, kind="stable").tolist():
        while busy and busy[0][0] <= starts[at]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lanes[at] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (int(ends[at]), int(lanes[at])))
    return lanes


def _ns(time_us: np.ndarray) -> np.ndarray:
    """Whole nanoseconds, int64."""
    return np.rint(np.asarray(time_us) * 1e3).astype(np.int64)


def _complete(name: str, pid: int, tid: int, start_us: float, end_us: float, args: dict[str, Any]) -> dict[str, Any]:
    return _span(name, pid, tid, round(start_us * 1e3), round(end_us * 1e3), args)


def _span(name: str, pid: int, tid: int, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    event = {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start / 1e3, "dur": (end - start) / 1e3}
    return event | {"args": args} if args else event


def _counter(name: str, pid: int, time_us: float, values: dict[str, float]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "ts": round(time_us * 1e3) / 1e3, "args": values}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _sort(kind: str, pid: int, tid: int) -> dict[str, Any]:
    index = pid if kind.startswith("process") else tid
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"sort_index": index}}


def _file(events: list[dict[str, Any]], about: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about | {"left_out": left_out}}
