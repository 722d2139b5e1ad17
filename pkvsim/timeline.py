"""A step's tasks on CTA slots that share the memory bandwidth: who runs where and when, and how long all of it takes.

Every running CTA reads at the lesser of its own speed and an equal share of what all read, so all that read advance
alike and one virtual clock (bytes read by a CTA that has read all along) orders their ends: two heaps, O(tasks log
slots). A task's fixed cost comes before its bytes and takes no bandwidth. The constants are the closed form's
(pkvsim.pricing), which sums up what is simulated here.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkvsim.cost import KV_ELEMENT_BYTES, useful_kv_bytes
from pkvsim.pricing import price_pinned, row_splits
from pkvsim.pricing_base import PARTIAL_ELEMENT_BYTES, cta_slots, merge_us, query_us, read_speeds
from pkvsim.route_model import RouteModel
from pkvsim.schedule import SEGMENT_COST, Schedule, engine_min_cost, make_schedule
from pkvsim.shapes import DecodeShape, check_seq_lens
from pkvsim.timeline_loop import read_bytes, run_tasks, stride_tasks


PINNABLE = ("buckets", "queue")  # the rules that take pinned splits, as in pricing.price_pinned


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """One layer's decode kernels of one step on one route.

    The arrays are by task in the order of schedule.tasks: the slot [num_tasks] int32 it ran on, start_us and end_us
    float64 (0 is the start of the first launch; fixed_us of ramp-up comes before any task), and bytes float64 of KV.
    """

    makespan_us: float  # kernel time: ramp-up, tasks, launches and merges
    schedule: Schedule
    num_slots: int
    cta_gb_s: float  # what one CTA reads at most
    shared_gb_s: float  # what all CTAs read at most
    merge_us: float  # of makespan_us, after the last task of each launch
    slot: np.ndarray  # [num_tasks] int32
    start_us: np.ndarray  # [num_tasks] float64
    end_us: np.ndarray  # [num_tasks] float64
    bytes: np.ndarray  # [num_tasks] float64


def simulate(
    model: RouteModel, shape: DecodeShape, seq_lens: Sequence[int] | np.ndarray, *, num_sms: int, splits: int | None = None
) -> Timeline:
    """Runs one step. splits: pinned splits of every row, which only split and workqueue take; None: the model chooses.

    Raises ValueError naming the argument.
    """
    lens = check_seq_lens(seq_lens)
    c = model.to_row()
    slots = cta_slots(c, num_sms)
    schedule = route_schedule(model, shape, lens, num_sms=num_sms, splits=splits)
    alone, shared = read_speeds(c, useful_kv_bytes(shape, lens), shape.group_size, KV_ELEMENT_BYTES, num_sms)
    tasks = schedule.tasks
    task_bytes = np.empty(len(tasks))
    fields = tasks.view(np.int32).reshape(-1, len(tasks.dtype))
    read_bytes(fields, lens, schedule.tile_tokens, 2.0 * shape.head_dim * KV_ELEMENT_BYTES, task_bytes)
    order, launch_ctas, gaps, merges = _launches(model, c, schedule, shape, lens)
    offsets = schedule.cta_offsets.astype(np.int64)
    places = np.arange(len(tasks))  # the tasks, CTA by CTA
    cta_us, task_us = model.task_us, model.segment_us if model.rule == "balanced" else 0.0
    if model.strided and len(tasks):
        places, offsets, launch_ctas = _stride(order, launch_ctas, slots)
        order = np.arange(len(offsets) - 1)
        cta_us, task_us = 0.0, model.task_us
    slot, start, end = np.empty(len(tasks), np.int32), np.empty(len(tasks)), np.empty(len(tasks))
    ramp = model.fixed_us + query_us(c, np.count_nonzero(lens) * shape.num_q_heads, shape.head_dim, KV_ELEMENT_BYTES)
    finish = run_tasks(
        order, offsets, places, launch_ctas, gaps, task_bytes, slots,
        cta_us, task_us, alone, shared, ramp, slot, start, end,
    )  # fmt: skip
    return Timeline(
        makespan_us=finish,
        schedule=schedule,
        num_slots=slots,
        cta_gb_s=alone / 1e3,
        shared_gb_s=shared / 1e3,
        merge_us=merges,
        slot=slot,
        start_us=start,
        end_us=end,
        bytes=task_bytes,
    )


def route_schedule(
    model: RouteModel, shape: DecodeShape, lens: np.ndarray, *, num_sms: int, splits: int | None = None
) -> Schedule:
    """The tasks that a route runs for lens [batch_size] int32; FlashInfer's are ours cut as its planner cuts them."""
    tile = int(model.tile_tokens)
    c = model.to_row()
    if model.rule == "balanced":
        return make_schedule(
            "balanced", shape, lens, tile_tokens=tile, num_ctas=cta_slots(c, num_sms),
            segment_cost=SEGMENT_COST, min_cost=engine_min_cost(shape.group_size),
        )  # fmt: skip
    name = "split" if model.rule == "buckets" else "workqueue"
    if splits is not None and model.rule in PINNABLE:
        return make_schedule(name, shape, lens, splits=splits, tile_tokens=tile)
    prices, most = np.empty(1), np.zeros(1, np.int64)
    price_pinned(
        lens, shape.num_kv_heads, shape.group_size, shape.head_dim, KV_ELEMENT_BYTES, num_sms, c[None], prices, most
    )
    counts = np.empty(len(lens), np.int64)
    row_splits(lens, shape.num_kv_heads, num_sms, c, int(most[0]), counts)
    return make_schedule(name, shape, lens, splits=counts, tile_tokens=tile)


def _stride(order: np.ndarray, launch_tasks: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every launch's tasks dealt out to at most `slots` CTAs: (tasks, CTA by CTA; their CTA offsets; the launches').

    order [num_tasks] and launch_tasks [num_launches + 1]: tasks in launch order, int64.
    """
    places, offsets, launch_ctas = np.empty_like(order), np.empty(len(order) + 1, np.int64), np.empty_like(launch_tasks)
    ctas = stride_tasks(order, launch_tasks, slots, places, offsets, launch_ctas)
    return places, offsets[: ctas + 1], launch_ctas


def _launches(
    model: RouteModel, c: np.ndarray, schedule: Schedule, shape: DecodeShape, lens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """CTAs in launch order [num_ctas] int64, their launches' offsets [num_launches + 1] int64, the time after each
    launch (merge and next launch) [num_launches] float64, and the sum of the merges."""
    num_ctas = schedule.num_ctas if len(schedule.tasks) else 0
    state = shape.group_size * (2 + shape.head_dim) * float(PARTIAL_ELEMENT_BYTES)
    row_counts = np.diff(schedule.split_offsets)
    memory = model.bandwidth_gb_s * 1e3
    if model.rule != "buckets":
        cut = schedule.num_partial_tasks if row_counts.max(initial=0) > 1 else 0
        gap = model.launch_us if model.rule == "queue" else 0.0
        merging = merge_us(c, float(row_counts.max()), float(cut), state, memory) if cut else 0.0
        return np.arange(num_ctas), np.array([0, num_ctas]), np.array([gap + merging]), merging
    rows = np.argsort(-lens.astype(np.int64), kind="stable")[: np.count_nonzero(lens)]
    row_ctas = schedule.split_offsets.astype(np.int64) * shape.num_kv_heads  # of split, CTA i runs task i
    firsts = np.flatnonzero(np.diff(lens[rows], prepend=-1))  # of the rows that share a launch
    counts = row_counts[rows] * shape.num_kv_heads
    ends = np.cumsum(counts)
    order = np.arange(num_ctas) + np.repeat(row_ctas[rows] - ends + counts, counts)
    cuts = np.append(0, ends[np.append(firsts[1:] - 1, len(rows) - 1)]) if len(rows) else np.zeros(1, np.int64)
    splits = row_counts[rows[firsts]].astype(float)
    # py_func is the formula without its compiled code, and takes arrays.
    merging = (splits > 1) * merge_us.py_func(c, splits, np.diff(cuts).astype(float), state, memory)
    gaps = merging + model.launch_us * (splits > 1)
    gaps[:-1] += model.launch_us
    return order, cuts.astype(np.int64), gaps, float(merging.sum())
