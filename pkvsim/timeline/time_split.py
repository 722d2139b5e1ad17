"""Where a simulated step's time goes: each moment of a timeline laid to what bounds it."""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import RouteModel
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.constants import read_speeds
from pkvsim.shapes import DecodeShape
from pkvsim.timeline.timeline import Timeline, queries_us

SATURATED = 1 - 1e-9  # of the shared speed, at which rounding does not matter


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Where one layer's kernel time goes; the parts add up to it. While tasks run, each moment belongs to one part."""

    bandwidth_us: float  # memory (or L2, for what it holds) is saturated; reading q and writing the output
    compute_us: float  # the arithmetic of the SMs is saturated
    cta_rate_us: float  # every CTA that there is reads as fast as one can, which is not enough to saturate
    tail_us: float  # the same, after the first CTA slot of the launch has run dry
    task_starts_us: float  # nothing is read: tasks and segments starting
    launches_us: float  # ramp-up, and every further launch
    merge_us: float  # merging partial states
    select_us: float = 0.0  # summarising new tokens' pages, scoring and selecting, before lists are attended to

    @property
    def bound(self) -> str:
        """The largest part's name, without its unit."""
        parts = asdict(self)
        return max(parts, key=parts.__getitem__).removesuffix("_us")


def saturated_by(
    model: RouteModel, shape: DecodeShape, line: Timeline, device: DeviceSpec, options: AttentionOptions = PLAIN
) -> str:
    """What caps all CTAs of a route's timeline together: "memory", "L2" (for the KV that it holds) or "arithmetic"."""
    args = line.bytes.sum(), options.query_shape(shape).group_size, options.kv_element_bytes(shape), device.num_sms
    _, shared = read_speeds(model.to_row(), *args)
    _, memory = read_speeds(replace(model, sm_heads_gb_s=math.inf).to_row(), *args)
    if shared < memory:
        return "arithmetic"
    return "L2" if memory > model.bandwidth_gb_s * 1e3 else "memory"


def time_split(
    model: RouteModel, line: Timeline, shape: DecodeShape, lens: np.ndarray, *, limit: str,
    options: AttentionOptions = PLAIN,
) -> TimeSplit:  # fmt: skip
    """Sums up a route's timeline of lens [batch_size] int32, simulated with options; limit as saturated_by gives it."""
    tasks, cta_offsets = line.schedule.tasks, line.schedule.cta_offsets
    queries = queries_us(model.to_row(), shape, lens, options)
    parts = {"saturated": 0.0, "cta_rate": 0.0, "tail": 0.0, "task_starts": 0.0}
    fixed = np.full(len(tasks), model.segment_us if model.rule == "balanced" else 0.0)
    fixed[cta_offsets[:-1][np.diff(cta_offsets) > 0]] += model.task_us
    reads = np.minimum(line.start_us + fixed, line.end_us)
    # The paper's split launches rows of one length at a time, longest first; the others launch once.
    launch = -lens[tasks["row"]].astype(np.int64) if model.rule == "buckets" else np.zeros(len(tasks), np.int64)
    by_launch = np.argsort(launch, kind="stable")
    for mine in np.split(by_launch, np.flatnonzero(np.diff(launch[by_launch])) + 1):
        if len(mine):
            _add_launch(parts, line, mine, reads[mine])
    saturated = parts.pop("saturated")
    compute = limit == "arithmetic"
    return TimeSplit(
        bandwidth_us=queries + (0.0 if compute else saturated),
        compute_us=saturated if compute else 0.0,
        cta_rate_us=parts["cta_rate"],
        tail_us=parts["tail"],
        task_starts_us=parts["task_starts"],
        launches_us=max(0.0, line.makespan_us - line.merge_us - queries - saturated - sum(parts.values())),
        merge_us=line.merge_us,
    )


def _add_launch(parts: dict[str, float], line: Timeline, mine: np.ndarray, reads: np.ndarray) -> None:
    """Adds the time of one launch's tasks `mine` (indices) to the parts; reads float64: when each begins to read."""
    starts, ends, slots = line.start_us[mine], line.end_us[mine], line.slot[mine]
    last_end = np.zeros(line.num_slots)
    np.maximum.at(last_end, slots, ends)
    dry = last_end[slots].min()  # when the first slot has nothing left to take
    times = np.concatenate((reads, ends, starts.min(keepdims=True), [dry]))
    change = np.concatenate((np.ones(len(reads)), -np.ones(len(ends)), [0.0, 0.0]))
    order = np.argsort(times, kind="stable")
    widths, reading = np.diff(times[order]), np.cumsum(change[order])[:-1]
    after_dry = times[order][:-1] >= dry
    idle = reading == 0
    full = ~idle & (reading * line.cta_gb_s >= SATURATED * line.shared_gb_s)
    parts["saturated"] += float(widths[full].sum())
    parts["task_starts"] += float(widths[idle].sum())
    parts["tail"] += float(widths[~idle & ~full & after_dry].sum())
    parts["cta_rate"] += float(widths[~idle & ~full & ~after_dry].sum())
