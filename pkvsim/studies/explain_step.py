"""One decode step on every route: what it costs, how its tasks lie on the CTA slots, and what bounds it."""
from __future__ import annotations

from collections.abc import Sequence
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
from pkvsim.pricing.counters import distinct_kv_bytes, useful_kv_bytes
from pkvsim.pricing.step_times import step_time
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens
from pkvsim.studies.shared_step import apart_device
from pkvsim.studies.step_report import RouteStep, StepReport
from pkvsim.timeline.shared import SharedStep, simulate_shared
from pkvsim.timeline.time_split import saturated_by, time_split
from pkvsim.timeline.timeline import Timeline, simulate

MAX_ROWS = 1 << 16
MEMORY_AND_L2 = "memory and L2"  # what gives the bytes of rows that find each other's pages in L2


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
    groups: PrefixGroups | None = None,
) -> StepReport:
    """Prices and simulates one step, planned once for `layers` layers, on the routes named, or on all the device has.

    splits: pinned splits of every row (split and workqueue). options: of every layer's attention; by default only
    routes that serve them are looked at. groups: rows that share leading pages, which balanced reads once for them;
    the other routes find them in L2 in part. Raises ValueError naming the argument.
    """
    lens, own_device = check_seq_lens(seq_lens), device
    if groups is not None:
        if options.window is not None:
            raise ValueError(f"window: expected None with shared pages, some of which it hides, got {options.window}")
        kv_bytes = useful_kv_bytes(shape, lens, options)
        device = apart_device(device, kv_bytes, distinct_kv_bytes(shape, lens, groups, options))
    check_int("layers", layers, 1, MAX_TOKENS)
    if splits is not None:
        check_int("splits", splits, 1, MAX_TOKENS)
    models, own_models = device_routes(device), device_routes(own_device)
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
    found = None
    if groups is not None and "balanced" in names:
        model = device_routes(own_device)["balanced"]
        found = simulate_shared(model, shape, lens, groups, own_device, options=options)
    prices, reason = dict(taken.prices), taken.reason
    if found is not None:
        prices["balanced"] = sum(_balanced_step_us(model, lens, layers, found.closed_us))
        best = min(names, key=prices.__getitem__)
        reason = (
            f"{best}: {prices[best]:,.1f} us a step, where balanced with shared reads takes {prices['balanced']:,.1f} "
            f"and with every row reading apart {taken.prices['balanced']:,.1f}"
        )
    return StepReport(
        shape=shape,
        seq_lens=lens,
        groups=groups,
        device=own_device,
        layers=layers,
        options=options,
        taken=taken.route if found is None else best,
        reason=reason,
        routes=tuple(
            _shared_route_step(found, own_device, lens, layers)
            if found is not None and name == "balanced"
            else _route_step(
                name, models[name], shape, lens, device, splits if name in PINNED_ROUTES else None,
                as_read(name, options), closed_us=taken.layer_us[name], step_us=taken.prices[name],
                timeline_step_us=oracle.prices[name], host_us=taken.host_us[name],
                finds_in_l2=models[name].bandwidth_gb_s > own_models[name].bandwidth_gb_s,
            )
            for name in names  # fmt: skip
        ),
    )


def _route_step(
    name: str, model: RouteModel, shape: DecodeShape, lens: np.ndarray, device: DeviceSpec, splits: int | None,
    options: AttentionOptions, *, closed_us: float, step_us: float, timeline_step_us: float, host_us: float,
    finds_in_l2: bool,
) -> RouteStep:  # fmt: skip
    """finds_in_l2: the device's memory stands for what rows find in L2 of each other's pages too."""
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
        saturated_by=MEMORY_AND_L2 if finds_in_l2 and limit == "memory" else limit,
        split=time_split(model, line, shape, lens, limit=limit, options=options),
    )


def _balanced_step_us(model: RouteModel, lens: np.ndarray, layers: int, layer_us: float) -> tuple[float, float]:
    """(GPU, host) us of a step of balanced layers of this kernel time. The host issues no layer faster for it."""
    used = lens[lens > 0]
    return step_time(model.to_row(), len(used), len(np.unique(used)), layers, layer_us)


def _shared_route_step(found: SharedStep, device: DeviceSpec, lens: np.ndarray, layers: int) -> RouteStep:
    """The balanced route of a step with reads."""
    line = found.timeline
    took, area = line.end_us - line.start_us, line.num_slots * line.makespan_us
    counts = np.diff(line.schedule.split_offsets)
    calibrated, model = device.calibration.get("balanced"), device_routes(device)["balanced"]
    gpu_us, host_us = _balanced_step_us(model, lens, layers, found.closed_us)
    return RouteStep(
        route="balanced",
        status="estimated" if calibrated is None else calibrated.status,
        model=model,
        timeline=line,
        closed_us=found.closed_us,
        step_us=gpu_us + host_us,
        timeline_step_us=sum(_balanced_step_us(model, lens, layers, line.makespan_us)),
        host_us=host_us,
        launches=line.schedule.num_launches,
        splits=(int(counts.min()), int(counts.max())),
        used_slots=len(np.unique(line.slot)),
        busy_share=float(took.sum() / area),
        longest_task=int(np.argmax(took)),
        saturated_by=MEMORY_AND_L2 if line.shared_gb_s > model.bandwidth_gb_s else "memory",
        split=found.split,
        read_gb_s=found.read_gb_s,
    )


def _launches(model: RouteModel, line: Timeline) -> int:
    """FlashInfer's chunks are merged by a launch of their own; XQA merges in the launch that attends."""
    if model.rule in ("buckets", "queue", "balanced"):
        return line.schedule.num_launches
    cut = int(np.diff(line.schedule.split_offsets).max(initial=0)) > 1
    return 1 + (model.rule == "chunk" and cut)
