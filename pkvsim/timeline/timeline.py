"""A step's tasks on CTA slots that share the memory bandwidth: who runs where and when, and how long all of it takes.

Every running CTA reads at the lesser of its own speed and an equal share of what all read, so all that read advance
alike and one virtual clock (bytes read by a CTA that has read all along) orders their ends: a heap, O(tasks log slots)
or less, for equal tasks that start together are one entry. A task's fixed cost comes before its bytes and takes no
bandwidth. The constants are the closed form's (pkvsim.pricing.prices), which sums up what is simulated here.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkvsim.devices.route_model import RouteModel
from pkvsim.devices.route_options import read_lens
from pkvsim.options import KV_ELEMENT_BYTES, PLAIN, AttentionOptions
from pkvsim.pricing.constants import PARTIAL_ELEMENT_BYTES, cta_slots, merge_us, query_us, read_speeds
from pkvsim.pricing.cuts import row_splits, sorted_lengths, tokens_read
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.prices import price_route
from pkvsim.schedule.make import Schedule, make_schedule
from pkvsim.shapes import DecodeShape, check_seq_lens
from pkvsim.timeline.event_loop import Record, Slots, StepTasks, run_tasks

PINNABLE = ("buckets", "queue")  # the rules that take pinned splits, as in pkvsim.pricing.prices


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
    model: RouteModel, shape: DecodeShape, seq_lens: Sequence[int] | np.ndarray, *, num_sms: int,
    splits: int | None = None, options: AttentionOptions = PLAIN,
) -> Timeline:  # fmt: skip
    """Runs one step.

    splits: pinned splits of every row, which only split and workqueue take; None: the model chooses. options: as the
    route reads them (route_options.as_read); whether it serves them is not looked at. They change what is read,
    computed and merged as in CalibratedPolicy.decide. Raises ValueError naming the argument.
    """
    run = _prepare(model, shape, seq_lens, num_sms, splits, options)
    num_tasks = len(run.schedule.tasks)
    # One block, and twice as long as what is used of it: glibc keeps freed memory for the next call up to twice the
    # longest block it has seen, and page faults of memory got anew take longer than the simulation.
    block = np.empty((8, num_tasks))
    start, end, read, slot = block[0], block[1], block[2], block[3].view(np.int32)[:num_tasks]
    finish = run_tasks(run.step, run.slots, run.ramp_us, Record(slot, start, end, read))
    return Timeline(
        makespan_us=finish,
        schedule=run.schedule,
        num_slots=run.slots.num_slots,
        cta_gb_s=run.slots.alone / 1e3,
        shared_gb_s=run.slots.shared / 1e3,
        merge_us=run.merge_us,
        slot=slot,
        start_us=start,
        end_us=end,
        bytes=read,
    )


def makespan_us(
    model: RouteModel, shape: DecodeShape, seq_lens: Sequence[int] | np.ndarray, *, num_sms: int,
    splits: int | None = None, options: AttentionOptions = PLAIN,
) -> float:  # fmt: skip
    """simulate(...).makespan_us, for which no task's slot and times are written down."""
    nothing = np.empty(0)
    run = _prepare(model, shape, seq_lens, num_sms, splits, options)
    return run_tasks(run.step, run.slots, run.ramp_us, Record(np.empty(0, np.int32), nothing, nothing, nothing))


def route_schedule(
    model: RouteModel, shape: DecodeShape, lens: np.ndarray, *, num_sms: int, splits: int | None = None,
    options: AttentionOptions = PLAIN,
) -> Schedule:  # fmt: skip
    """The tasks that a route runs for lens [batch_size] int32; FlashInfer's are ours cut as its planner cuts them.

    splits and options as simulate's.
    """
    return _schedule(model, model.to_row(), shape, lens, num_sms, splits, options)


def _schedule(
    model: RouteModel, constants: np.ndarray, shape: DecodeShape, lens: np.ndarray, num_sms: int, splits: int | None,
    options: AttentionOptions,
) -> Schedule:  # fmt: skip
    tile, window = int(model.tile_tokens), options.reach
    if model.rule == "balanced":
        return make_schedule(
            "balanced", shape, lens, tile_tokens=tile, num_ctas=cta_slots(constants, num_sms), window=window,
            costs=model.costs.of_kernel(
                columns=options.query_shape(shape).group_size, v_head_dim=options.value_dim(shape),
                kv_element_bytes=options.kv_element_bytes(shape), page_size=shape.page_size),
        )  # fmt: skip
    name = "split" if model.rule == "buckets" else "workqueue"
    if splits is not None and model.rule in PINNABLE:
        return make_schedule(name, shape, lens, splits=splits, tile_tokens=tile, window=window)
    ordered = sorted_lengths(lens)
    reads = ordered if window is None else tokens_read(ordered, window, constants)
    _, longest = price_route(ordered, reads, heads_of(shape, num_sms, options), constants, 0)
    counts = np.empty(len(lens), np.int64)
    row_splits(lens, read_lens(lens, window, tile), shape.num_kv_heads, num_sms, constants, longest, counts)
    return make_schedule(name, shape, lens, splits=counts, tile_tokens=tile, window=window)


def queries_us(constants: np.ndarray, shape: DecodeShape, lens: np.ndarray, options: AttentionOptions = PLAIN) -> float:
    """Reading q and writing the output of lens [batch_size], part of the ramp-up; constants: RouteModel.to_row."""
    heads = int(np.count_nonzero(lens)) * options.query_shape(shape).num_q_heads
    return query_us(constants, heads, 0.5 * (shape.head_dim + options.value_dim(shape)), KV_ELEMENT_BYTES)


@dataclass(frozen=True, slots=True)
class _Run:
    """A step ready to run."""

    schedule: Schedule
    step: StepTasks
    slots: Slots
    ramp_us: float  # when the first launch's CTAs start
    merge_us: float  # sum over the launches


def _prepare(
    model: RouteModel, shape: DecodeShape, seq_lens: Sequence[int] | np.ndarray, num_sms: int, splits: int | None,
    options: AttentionOptions,
) -> _Run:  # fmt: skip
    lens = check_seq_lens(seq_lens)
    constants, columns = model.to_row(), options.query_shape(shape).group_size
    slots, width = cta_slots(constants, num_sms), options.kv_token_bytes(shape)
    schedule = _schedule(model, constants, shape, lens, num_sms, splits, options)
    reads = read_lens(lens, options.reach, schedule.tile_tokens)
    kv_bytes = int(reads.sum(dtype=np.int64)) * shape.num_kv_heads * width
    alone, shared = read_speeds(constants, kv_bytes, columns, options.kv_element_bytes(shape), num_sms)
    state = columns * (2 + options.value_dim(shape)) * float(PARTIAL_ELEMENT_BYTES)
    spans, launch_spans, gaps, merges = _launches(model, constants, schedule, shape, lens, columns, state)
    cta_us, task_us = model.task_us, model.segment_us if model.rule == "balanced" else 0.0
    if model.strided:
        cta_us, task_us = 0.0, model.task_us
    ramp = model.fixed_us + queries_us(constants, shape, lens, options)
    step = StepTasks(
        tasks=schedule.tasks.view(np.int32).reshape(-1, len(schedule.tasks.dtype.names or ())),
        lens=lens,
        tile_tokens=schedule.tile_tokens,
        token_bytes=float(width),
        spans=spans,
        launch_spans=launch_spans,
        cta_offsets=schedule.cta_offsets if model.rule == "balanced" else np.empty(0, np.int32),
        strided=bool(model.strided),
        gaps_us=gaps,
    )
    return _Run(schedule, step, Slots(slots, float(cta_us), float(task_us), alone, shared), float(ramp), merges)


def _launches(
    model: RouteModel, constants: np.ndarray, schedule: Schedule, shape: DecodeShape, lens: np.ndarray,
    columns: int, state_bytes: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:  # fmt: skip
    """Task ranges in launch order [num_spans, 2] int64, the launches' offsets into them [num_launches + 1] int64, the
    time after each launch (merge and next launch) [num_launches] float64, and the sum of the merges.

    columns: of a KV head; state_bytes: of a task's partial state.
    """
    row_counts = np.diff(schedule.split_offsets)
    if model.rule != "buckets":
        cut = schedule.num_partial_tasks if row_counts.max(initial=0) > 1 else 0
        gap = model.launch_us if model.rule == "queue" else 0.0
        merging = merge_us(constants, columns, state_bytes, float(row_counts.max()), float(cut)) if cut else 0.0
        return np.array([[0, len(schedule.tasks)]]), np.array([0, 1]), np.array([gap + merging]), merging
    rows = np.argsort(-lens, kind="stable")[: np.count_nonzero(lens)]
    row_tasks = schedule.split_offsets * np.int64(shape.num_kv_heads)
    spans = np.stack((row_tasks[rows], row_tasks[rows + 1]), axis=1)
    # Rows of equal length share a launch.
    launch_spans = np.append(np.flatnonzero(np.diff(lens[rows], prepend=-1)), len(rows))
    tasks = np.diff(np.append(0, np.cumsum(row_counts[rows]))[launch_spans]) * float(shape.num_kv_heads)
    splits = row_counts[rows[launch_spans[:-1]]].astype(float)
    # py_func is the formula without its compiled code, and takes arrays.
    merging = (splits > 1) * merge_us.py_func(constants, columns, state_bytes, splits, tasks)
    gaps = merging + model.launch_us * (splits > 1)
    gaps[:-1] += model.launch_us
    return spans, launch_spans, gaps, float(merging.sum())
