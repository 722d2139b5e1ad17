"""One decode step on every route: what it costs, how its tasks lie on the CTA slots, and what bounds it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel
from pkvsim.devices.route_options import as_read, asked, serving_routes, why_not
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.calibrated import CalibratedPolicy
from pkvsim.policy.choose import PINNED_ROUTES
from pkvsim.policy.oracle import OraclePolicy
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens
from pkvsim.timeline.time_split import TimeSplit, saturated_by, time_split
from pkvsim.timeline.timeline import Timeline, simulate

MAX_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouteStep:
    """One layer of the step on one route."""

    route: str
    status: str  # "calibrated" or "estimated"
    model: RouteModel
    timeline: Timeline
    closed_us: float  # kernel time by the closed form
    step_us: float  # of all layers by the closed form, the host's part included: what the calibrated policy compares
    timeline_step_us: float  # the same by the timeline: what the oracle compares
    host_us: float  # of step_us, what the wall clock sees beside the GPU: planning, issuing, synchronising
    launches: int
    splits: tuple[int, int]  # fewest and most of a row that has tokens
    used_slots: int
    busy_share: float  # of num_slots * makespan, in which a task runs
    longest_task: int | None  # index into timeline.schedule.tasks
    saturated_by: str  # what the most that all CTAs read is due to: "memory", "L2" or "arithmetic"
    split: TimeSplit

    @property
    def timeline_us(self) -> float:
        """Kernel time by the timeline."""
        return self.timeline.makespan_us

    def longest_task_us(self) -> float:
        """How long the longest task ran; 0 without tasks."""
        at = self.longest_task
        return 0.0 if at is None else float(self.timeline.end_us[at] - self.timeline.start_us[at])

    def why(self) -> str:
        """What bounds the route, in a line."""
        share = getattr(self.split, f"{self.split.bound}_us") / self.timeline_us if self.timeline_us else 0.0
        line = self.timeline
        speeds = f"{line.num_slots:,} CTA slots of {line.cta_gb_s:.3g} GB/s against {line.shared_gb_s:,.0f} GB/s"
        words = {
            "bandwidth": f"{self.saturated_by} bandwidth, {line.shared_gb_s:,.0f} GB/s",
            "compute": f"compute: the SMs' arithmetic keeps up with {line.shared_gb_s:,.0f} GB/s of KV",
            "cta_rate": f"a single CTA's rate: {self.used_slots:,} of {speeds}",
            "tail": f"tail: slots run dry while the longest task takes {self.longest_task_us():,.4g} us",
            "task_starts": f"task starts: {len(line.schedule.tasks):,} tasks' fixed cost on {self.used_slots:,} slots",
            "launches": f"launching: the ramp-up of {self.launches} launches" if self.launches > 1 else "the launch",
            "merge": f"merging {line.schedule.num_partial_tasks:,} partial states",
        }[self.split.bound]
        return f"{words} ({share:.0%} of the time)"

    def to_dict(self) -> dict[str, Any]:
        """What `pkvsim step --json` prints of a route."""
        line, at = self.timeline, self.longest_task
        longest: dict[str, float] | None = None
        if at is not None:
            task = line.schedule.tasks[at]
            longest = {name: int(task[name]) for name in ("row", "kv_head", "split")}
            longest.update(us=self.longest_task_us(), kv_bytes=int(line.bytes[at]))
        return {
            "status": self.status,
            "closed_us": self.closed_us,
            "timeline_us": self.timeline_us,
            "step_us": self.step_us,
            "timeline_step_us": self.timeline_step_us,
            "host_us": self.host_us,
            "launches": self.launches,
            "splits": list(self.splits),
            "tasks": len(line.schedule.tasks),
            "ctas": line.schedule.num_ctas if len(line.schedule.tasks) else 0,
            "slots": line.num_slots,
            "used_slots": self.used_slots,
            "busy_share": self.busy_share,
            "longest_task": longest,
            "cta_gb_s": line.cta_gb_s,
            "shared_gb_s": line.shared_gb_s,
            "bound": self.split.bound,
            "why": self.why(),
            "time_us": asdict(self.split),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepReport:
    """A step on every route asked for, in the order of ROUTES."""

    shape: DecodeShape
    seq_lens: np.ndarray  # [batch_size] int32
    device: DeviceSpec
    layers: int
    options: AttentionOptions  # of every layer's attention
    taken: str  # the cheapest by the closed form, planning included: what the calibrated policy does
    reason: str
    routes: tuple[RouteStep, ...]

    def to_dict(self) -> dict[str, Any]:
        """The object that `pkvsim step --json` prints."""
        return {
            "device": self.device.name,
            "shape": asdict(self.shape),
            "seq_lens": self.seq_lens.tolist(),
            "kv_bytes": useful_kv_bytes(self.shape, self.seq_lens, self.options),
            "layers": self.layers,
            "options": asdict(self.options),
            "taken": self.taken,
            "reason": self.reason,
            "routes": {route.route: route.to_dict() for route in self.routes},
        }


def parse_seq_lens(text: str) -> np.ndarray:
    """int32 [batch_size] from `65536,2048x16`: lengths in tokens, x16 for sixteen rows. ValueError naming the part."""
    lens: list[int] = []
    for part in text.split(","):
        length, times, count = part.strip().lower().partition("x")
        try:
            row, repeats = int(length), int(count) if times else 1
        except ValueError:
            raise ValueError(f"seq_lens: expected LENGTH or LENGTHxROWS, got {part.strip()!r}") from None
        check_int("seq_lens", row, 0, MAX_TOKENS)
        check_int("seq_lens: rows", repeats, 1, MAX_ROWS)
        lens += [row] * repeats
        if len(lens) > MAX_ROWS:
            raise ValueError(f"seq_lens: expected at most {MAX_ROWS} rows, got more")
    return np.array(lens, np.int32)


def explain_step(
    shape: DecodeShape,
    seq_lens: Sequence[int] | np.ndarray,
    device: DeviceSpec,
    *,
    routes: Sequence[str] | None = None,
    layers: int = 1,
    splits: int | None = None,
    options: AttentionOptions = PLAIN,
) -> StepReport:
    """Prices and simulates one step, planned once for `layers` layers, on the routes named, or on all the device has.

    splits: pinned splits of every row (split and workqueue). options: of every layer's attention; by default only
    routes that serve them are looked at. Raises ValueError naming the argument.
    """
    lens = check_seq_lens(seq_lens)
    check_int("layers", layers, 1, MAX_TOKENS)
    if splits is not None:
        check_int("splits", splits, 1, MAX_TOKENS)
    models = device_routes(device)
    have = serving_routes(shape, options, tuple(name for name in ROUTES if name in models))
    if not have:
        reasons = (f"{name}: {why_not(name, shape, options)}" for name in ROUTES if name in models)
        raise ValueError(f"shape: expected one that a route of {device.name} serves; {'; '.join(reasons)}")
    names = have if routes is None else tuple(routes)
    unknown = [name for name in names if name not in have]
    if unknown or not names:
        needs = "".join(f", {name}" for name in asked(shape, options))
        got = ", ".join(unknown) or "none"
        raise ValueError(f"routes: expected some of {', '.join(have)} ({device.name}{needs}), got {got}")
    names = tuple(name for name in ROUTES if name in names)
    step: dict[str, Any] = {"layers": layers, "available": names, "options": options}
    taken = CalibratedPolicy(split_splits=splits, workqueue_splits=splits).decide(shape, lens, device, **step)
    oracle = OraclePolicy(split_splits=splits, workqueue_splits=splits).decide(shape, lens, device, **step)
    return StepReport(
        shape=shape,
        seq_lens=lens,
        device=device,
        layers=layers,
        options=options,
        taken=taken.route,
        reason=taken.reason,
        routes=tuple(
            _route_step(
                name, models[name], shape, lens, device, splits if name in PINNED_ROUTES else None,
                as_read(name, options), closed_us=taken.layer_us[name], step_us=taken.prices[name],
                timeline_step_us=oracle.prices[name], host_us=taken.host_us[name],
            )
            for name in names  # fmt: skip
        ),
    )


def _route_step(
    name: str, model: RouteModel, shape: DecodeShape, lens: np.ndarray, device: DeviceSpec, splits: int | None,
    options: AttentionOptions, *, closed_us: float, step_us: float, timeline_step_us: float, host_us: float,
) -> RouteStep:  # fmt: skip
    line = simulate(model, shape, lens, num_sms=device.num_sms, splits=splits, options=options)
    counts = np.diff(line.schedule.split_offsets)[lens > 0]
    took = line.end_us - line.start_us
    area = line.num_slots * line.makespan_us
    limit = saturated_by(model, shape, line, device, options)
    calibrated = device.calibration.get(name)
    return RouteStep(
        route=name,
        status="estimated" if calibrated is None else calibrated.status,
        model=model,
        timeline=line,
        closed_us=closed_us,
        step_us=step_us,
        timeline_step_us=timeline_step_us,
        host_us=host_us,
        launches=_launches(model, line),
        splits=(int(counts.min()), int(counts.max())) if len(counts) else (0, 0),
        used_slots=len(np.unique(line.slot)),
        busy_share=float(took.sum() / area) if area else 0.0,
        longest_task=int(np.argmax(took)) if len(took) else None,
        saturated_by=limit,
        split=time_split(model, line, shape, lens, limit=limit, options=options),
    )


def _launches(model: RouteModel, line: Timeline) -> int:
    """FlashInfer's chunks are merged by a launch of their own; XQA merges in the launch that attends."""
    if model.rule in ("buckets", "queue", "balanced"):
        return line.schedule.num_launches
    cut = int(np.diff(line.schedule.split_offsets).max(initial=0)) > 1
    return 1 + (model.rule == "chunk" and cut)
