"""A balanced step whose rows read their common pages once, on CTAs that read at speeds of their own.

A read for many columns is bound by its products, and asks for less at a time than CTAs that read rows, which have more
of the bandwidth where that is used up. What members share is merged behind the last task of a range, once the parts of
their read have ended (pkvsim.schedule.spans).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import RouteModel
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.constants import cta_slots, read_speeds
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.shared import ReadPrices, SharedPrices, again_bytes, apart_gb_s, read_prices, shared_costs_of
from pkvsim.pricing.shared_us import shared_layer, shared_us
from pkvsim.schedule.costs import BalancedCosts, SharedCosts
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.make import Schedule, make_schedule
from pkvsim.schedule.task_list import SharedReads
from pkvsim.shapes import DecodeShape
from pkvsim.timeline.range_loop import RangeMerges, RangeTasks, run_merges, run_ranges
from pkvsim.timeline.time_split import TimeSplit
from pkvsim.timeline.timeline import Timeline, queries_us


@dataclass(frozen=True, slots=True, eq=False)
class SharedStep:
    """A simulated step with reads."""

    timeline: Timeline
    split: TimeSplit
    closed_us: float  # kernel time by the closed form
    read_gb_s: float  # that one CTA keeps up with in a read


def shared_schedule(
    model: RouteModel, shape: DecodeShape, lens: np.ndarray, groups: PrefixGroups, device: DeviceSpec, *,
    options: AttentionOptions = PLAIN, costs: SharedCosts | None = None,
) -> Schedule:  # fmt: skip
    """The engine's schedule of lens [batch_size] int32; without `shared` where no two rows read together. costs: what
    it weighs, by default what the engine does."""
    return make_schedule(
        "balanced", shape, lens, tile_tokens=int(model.tile_tokens), num_ctas=cta_slots(model.to_row(), device.num_sms),
        window=options.reach, groups=groups, query_tokens=options.query_tokens,
        shared_costs=costs or shared_costs_of(device, shape, len(lens), options),
        costs=kernel_costs(model, shape, options),
    )  # fmt: skip


def kernel_costs(model: RouteModel, shape: DecodeShape, options: AttentionOptions) -> BalancedCosts:
    """What the route's schedule weighs for the kernel of these heads."""
    return model.costs.of_kernel(
        columns=options.query_shape(shape).group_size, v_head_dim=options.value_dim(shape),
        kv_element_bytes=options.kv_element_bytes(shape), page_size=shape.page_size,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class SharedTasks:
    """A step with reads laid out: all that its times follow from but prices."""

    schedule: Schedule
    of_read: np.ndarray  # [num_tasks] bool
    columns: np.ndarray  # [num_tasks] int64 that the task reads for
    sizes: np.ndarray  # [num_tasks] float64 bytes
    merges: RangeMerges  # us: the states that each output is merged of
    alone: float  # bytes per us of one CTA
    bandwidth: float  # bytes per us of all, with what is found in L2
    queries_us: float


def shared_tasks(
    model: RouteModel, shape: DecodeShape, lens: np.ndarray, groups: PrefixGroups, device: DeviceSpec, *,
    options: AttentionOptions = PLAIN, costs: SharedCosts | None = None,
) -> SharedTasks | None:  # fmt: skip
    """The tasks of one layer of a step of lens [batch_size] int32; None where no two rows read together. costs: as
    shared_schedule's."""
    schedule = shared_schedule(model, shape, lens, groups, device, options=options, costs=costs)
    shared = schedule.shared
    if shared is None:
        return None
    constants, columns = model.to_row(), options.query_shape(shape).group_size
    tasks = schedule.tasks
    ends = np.minimum(tasks["tile_end"].astype(np.int64) * schedule.tile_tokens, lens[tasks["row"]])
    tokens = np.maximum(0, ends - tasks["tile_begin"].astype(np.int64) * schedule.tile_tokens)
    sizes = tokens * float(options.kv_token_bytes(shape))
    alone, bandwidth = read_speeds(
        constants, float(sizes.sum()), columns, options.kv_element_bytes(shape), device.num_sms
    )
    members = groups.members(
        lens, page_size=shape.page_size, tile_tokens=schedule.tile_tokens, query_tokens=options.query_tokens
    )
    prefix_bytes = shared.reads["tiles"] * schedule.tile_tokens * shape.num_kv_heads * options.kv_token_bytes(shape)
    group_of_read = members[shared.members[shared.reads["member_begin"]]]
    again = prefix_bytes <= again_bytes(device)  # [num_reads]: it finds in L2 what another read of its group has read
    again[np.unique(group_of_read, return_index=True)[1]] = False
    anew = float(sizes[~np.append(again, False)[shared.read_of_task]].sum())
    return SharedTasks(
        schedule=schedule, of_read=shared.read_of_task >= 0, columns=shared.members_of_tasks() * columns, sizes=sizes,
        merges=_merges(schedule, shared, shape.num_kv_heads), alone=alone,
        bandwidth=apart_gb_s(bandwidth, float(sizes.sum()), anew),
        queries_us=queries_us(constants, shape, lens, options),
    )  # fmt: skip


class SharedTimes(NamedTuple):
    """When a step's tasks run, and in which times the bandwidth is used up, reads compute, and others read alone."""

    start_us: np.ndarray  # [num_tasks] float64
    end_us: np.ndarray  # [num_tasks] float64
    last_task_us: float
    makespan_us: float
    saturated_us: float
    computing_us: float
    alone_us: float


def run_shared(tasks: SharedTasks, model: RouteModel, reads: ReadPrices) -> SharedTimes:
    """Runs one layer at these prices."""
    speeds = np.where(tasks.of_read, min(tasks.alone, reads.read_gb_s * 1e3), tasks.alone)
    fixed = np.where(tasks.of_read, tasks.columns * reads.read_us, model.segment_us)
    ramp = model.fixed_us + reads.start_us + tasks.queries_us
    offsets = tasks.schedule.cta_offsets
    start, end = np.zeros((2, len(tasks.sizes)))
    ranges = RangeTasks(offsets, fixed, tasks.sizes, speeds)
    parts = run_ranges(ranges, tasks.of_read, tasks.bandwidth, reads.read_share, ramp, start, end)
    last_task = float(end.max(initial=ramp))
    merges = tasks.merges._replace(us=reads.row_us + reads.state_us * tasks.merges.us)
    return SharedTimes(start, end, last_task, run_merges(merges, offsets, end, last_task), *parts)


def simulate_shared(
    model: RouteModel, shape: DecodeShape, lens: np.ndarray, groups: PrefixGroups, device: DeviceSpec, *,
    options: AttentionOptions = PLAIN, prices: SharedPrices | None = None, costs: SharedCosts | None = None,
) -> SharedStep | None:  # fmt: skip
    """Runs one layer of a step of lens [batch_size] int32 on the balanced route; None where no two rows read together.

    costs: as shared_schedule's; prices: as read_prices'. Raises ValueError naming the argument.
    """
    costs = costs or shared_costs_of(device, shape, len(lens), options)
    tasks = shared_tasks(model, shape, lens, groups, device, options=options, costs=costs)
    if tasks is None:
        return None
    schedule, constants = tasks.schedule, model.to_row()
    reads = read_prices(model, device, shape, options, costs, prices)
    times = run_shared(tasks, model, reads)
    merge_us = times.makespan_us - times.last_task_us
    ramp = model.fixed_us + reads.start_us + tasks.queries_us
    busy = times.saturated_us + times.computing_us + times.alone_us
    line = Timeline(
        makespan_us=times.makespan_us, schedule=schedule, num_slots=cta_slots(constants, device.num_sms),
        cta_gb_s=tasks.alone / 1e3, shared_gb_s=tasks.bandwidth / 1e3, merge_us=merge_us,
        start_us=times.start_us, end_us=times.end_us, bytes=tasks.sizes,
        slot=np.repeat(np.arange(schedule.num_ctas, dtype=np.int32), np.diff(schedule.cta_offsets)),
    )  # fmt: skip
    split = TimeSplit(
        bandwidth_us=tasks.queries_us + times.saturated_us, compute_us=times.computing_us,
        cta_rate_us=times.alone_us, tail_us=0.0, task_starts_us=times.last_task_us - ramp - busy,
        launches_us=ramp - tasks.queries_us, merge_us=merge_us,
    )  # fmt: skip
    rows = int(np.count_nonzero(lens))
    read = round(float(tasks.sizes.sum()) / options.kv_token_bytes(shape)) // shape.num_kv_heads
    layer = shared_layer(rows, read, heads_of(shape, device.num_sms, options), constants, reads, costs)
    members = groups.members(
        lens, page_size=shape.page_size, tile_tokens=schedule.tile_tokens, query_tokens=options.query_tokens
    )
    prefixes = groups.prefix_pages.astype(np.int64) * shape.page_size
    closed_us = float(shared_us(lens.astype(np.int64), members, prefixes, layer))
    return SharedStep(line, split, closed_us, reads.read_gb_s)


def _merges(schedule: Schedule, shared: SharedReads, heads: int) -> RangeMerges:
    """Outputs that are merged of several states, so many each instead of us: those of members, and of other heads that
    are cut."""
    tasks = schedule.tasks
    own = np.flatnonzero(shared.read_of_task < 0)
    key = tasks["row"][own].astype(np.int64) * heads + tasks["kv_head"][own]  # of each output
    own = own[np.argsort(key, kind="stable")]
    first, end = _runs(tasks["row"][own].astype(np.int64) * heads + tasks["kv_head"][own])
    # Of each output: the parts of its read, and its own tasks but the last, whose CTA merges.
    reading = np.flatnonzero(shared.read_of_task >= 0)
    key = shared.read_of_task[reading].astype(np.int64) * heads + tasks["kv_head"][reading]
    reading = reading[np.argsort(key, kind="stable")]
    key = np.sort(key)
    last = own[end - 1]
    read = shared.read_of_row[tasks["row"][last]].astype(np.int64)
    wanted = read * heads + tasks["kv_head"][last]
    begin_read, end_read = (np.where(read < 0, 0, np.searchsorted(key, wanted, side)) for side in ("left", "right"))
    states = (end_read - begin_read) + (end - first)
    merged = np.flatnonzero(states > 1)
    cta = np.searchsorted(schedule.cta_offsets, last, side="right") - 1
    merged = merged[np.argsort(last[merged], kind="stable")]
    awaited = [
        np.concatenate((reading[a:b], own[c:d]))
        for a, b, c, d in zip(begin_read[merged], end_read[merged], first[merged], end[merged] - 1)
    ]
    counts = np.array([len(some) for some in awaited], np.int64)
    ends = np.cumsum(counts)
    return RangeMerges(
        cta_offsets=np.searchsorted(cta[merged], np.arange(schedule.num_ctas + 1)).astype(np.int32),
        awaits_begin=(ends - counts).astype(np.int32),
        awaits_end=ends.astype(np.int32),
        awaited=np.concatenate(awaited).astype(np.int32) if awaited else np.zeros(0, np.int32),
        us=states[merged].astype(np.float64),
    )


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal keys begin and end."""
    edges = np.flatnonzero(np.diff(keys)) + 1
    return np.append(0, edges)[: len(keys)], np.append(edges, len(keys))[: max(1, len(edges) + 1)]
