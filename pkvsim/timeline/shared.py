"""A balanced step whose rows read their common pages once, on CTAs that read at speeds of their own.

A read for many columns is bound by its products, so the CTAs beside it have more of the bandwidth. What members share
is merged behind the last task of a range, once the parts of their read have ended (pkvsim.schedule.spans).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import RouteModel
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.constants import cta_slots, read_speeds
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.shared import ReadPrices, SharedPrices, apart_gb_s, read_prices, shared_costs_of
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


def simulate_shared(
    model: RouteModel, shape: DecodeShape, lens: np.ndarray, groups: PrefixGroups, device: DeviceSpec, *,
    options: AttentionOptions = PLAIN, prices: SharedPrices | None = None, costs: SharedCosts | None = None,
) -> SharedStep | None:  # fmt: skip
    """Runs one layer of a step of lens [batch_size] int32 on the balanced route; None where no two rows read together.

    costs: as shared_schedule's; prices: as read_prices'. Raises ValueError naming the argument.
    """
    costs = costs or shared_costs_of(device, shape, len(lens), options)
    schedule = shared_schedule(model, shape, lens, groups, device, options=options, costs=costs)
    shared = schedule.shared
    if shared is None:
        return None
    constants, columns = model.to_row(), options.query_shape(shape).group_size
    reads = read_prices(model, device, shape, options, costs, prices)
    tasks, of_read = schedule.tasks, shared.read_of_task >= 0
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
    again = prefix_bytes <= reads.again_bytes  # [num_reads]: it finds in L2 what another read of its group has read
    again[np.unique(group_of_read, return_index=True)[1]] = False
    anew = float(sizes[~np.append(again, False)[shared.read_of_task]].sum())
    bandwidth = apart_gb_s(bandwidth, float(sizes.sum()), anew)
    speeds = np.where(of_read, min(alone, reads.read_gb_s * 1e3), min(alone, reads.row_gb_s * 1e3))
    fixed = np.where(of_read, shared.members_of_tasks() * columns * reads.read_us, model.segment_us)
    queries = queries_us(constants, shape, lens, options)
    ramp = model.fixed_us + reads.start_us + queries
    ranges = RangeTasks(schedule.cta_offsets, fixed, sizes, speeds)
    merges = _merges(schedule, shared, shape.num_kv_heads, reads)
    start, end = np.zeros(len(tasks)), np.zeros(len(tasks))
    saturated, computing, alone_us = run_ranges(ranges, of_read, bandwidth, ramp, start, end)
    last_task = float(end.max(initial=ramp))
    makespan = run_merges(merges, schedule.cta_offsets, end, last_task)
    line = Timeline(
        makespan_us=makespan, schedule=schedule, num_slots=cta_slots(constants, device.num_sms), cta_gb_s=alone / 1e3,
        shared_gb_s=bandwidth / 1e3, merge_us=makespan - last_task, start_us=start, end_us=end, bytes=sizes,
        slot=np.repeat(np.arange(schedule.num_ctas, dtype=np.int32), np.diff(schedule.cta_offsets)),
    )  # fmt: skip
    split = TimeSplit(
        bandwidth_us=queries + saturated, compute_us=computing, cta_rate_us=alone_us, tail_us=0.0,
        task_starts_us=last_task - ramp - saturated - computing - alone_us, launches_us=ramp - queries,
        merge_us=makespan - last_task,
    )  # fmt: skip
    rows, read = int(np.count_nonzero(lens)), int(tokens.sum()) // shape.num_kv_heads
    layer = shared_layer(rows, read, heads_of(shape, device.num_sms, options), constants, reads, costs)
    prefixes = groups.prefix_pages.astype(np.int64) * shape.page_size
    closed_us = float(shared_us(lens.astype(np.int64), members, prefixes, layer))
    return SharedStep(line, split, closed_us, reads.read_gb_s)


def _merges(schedule: Schedule, shared: SharedReads, heads: int, prices: ReadPrices) -> RangeMerges:
    """Outputs that are merged of several states: those of members, and of other heads that are cut."""
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
        us=prices.row_us + prices.state_us * states[merged].astype(np.float64),
    )


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal keys begin and end."""
    edges = np.flatnonzero(np.diff(keys)) + 1
    return np.append(0, edges)[: len(keys)], np.append(edges, len(keys))[: max(1, len(edges) + 1)]
