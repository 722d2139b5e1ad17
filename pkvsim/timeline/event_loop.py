"""The compiled event loop of pkvsim.timeline.timeline."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import allocating, inner, inner_allocating
from pkvsim.timeline.heap import pop, push

FEW_ENDS = 8  # a launch with no more distinct task sizes needs no heap


class StepTasks(NamedTuple):
    """The tasks of a step, launch after launch."""

    tasks: np.ndarray  # [num_tasks, 5] int32, schedule.TASK_DTYPE's fields
    lens: np.ndarray  # [batch_size] int32
    tile_tokens: int
    token_bytes: float  # of one token and KV head
    spans: np.ndarray  # [num_spans, 2] int64, tasks [begin, end), span after span in launch order
    launch_spans: np.ndarray  # [num_launches + 1] int64, launch i holds spans [launch_spans[i], launch_spans[i + 1])
    cta_offsets: np.ndarray  # [num_ctas + 1] int32, of the only launch: CTA i runs its tasks [.., ..); empty: one each
    strided: bool  # a CTA a slot at most, CTA b of a launch running its tasks b, b + num_slots, ..; no cta_offsets
    gaps_us: np.ndarray  # [num_launches] float64, from a launch's last task to the next launch, or to the end


class Slots(NamedTuple):
    """What runs them."""

    num_slots: int
    cta_us: float  # fixed cost of a CTA, before its first task
    task_us: float  # fixed cost of a task
    alone: float  # bytes per us of one CTA
    shared: float  # bytes per us of all


class Record(NamedTuple):
    """What is written down of every task; all empty where nobody asks."""

    slot_of: np.ndarray  # [num_tasks] int32
    start_us: np.ndarray  # [num_tasks] float64
    end_us: np.ndarray  # [num_tasks] float64
    read_bytes: np.ndarray  # [num_tasks] float64


class _Launch(NamedTuple):
    """The launch that runs."""

    order: np.ndarray  # [num_tasks] int32, its tasks
    sizes: np.ndarray  # [num_tasks] float64, bytes of each
    cta_offsets: np.ndarray  # as StepTasks'
    ctas: int
    stride: int  # places from a slot's task to its next one
    strided: bool


class _Queues(NamedTuple):
    """Who waits and who reads.

    Slots that start tasks of one size at the same moment end them together: such a group is one entry of a queue, by
    its first slot, and a list of slots from there. Groups in their fixed cost stand by its end, which is the same for
    all that start a CTA, and for all that go on with one, so that two queues are in order as they are: rings.
    """

    next_of: np.ndarray  # [num_slots] int32, the next slot of a group, -1 at its end
    members: np.ndarray  # [num_slots] int32, slots of the group that begins here
    wait_ends: np.ndarray  # [2, num_slots] float64, going on and starting
    wait_groups: np.ndarray  # [2, num_slots] int32
    heads: np.ndarray  # [2] int64
    waiting: np.ndarray  # [2] int64
    read_keys: np.ndarray  # [num_slots] float64, a heap: reading groups by the virtual clock's end
    read_groups: np.ndarray  # [num_slots] int32
    place_of: np.ndarray  # [num_slots] int32, a slot's place in the launch's order
    stop_of: np.ndarray  # [num_slots] int32, the end of its places
    free: np.ndarray  # [num_slots] int32, slots that have ended a task now, ascending


@inner_allocating
def _new_queues(num_slots: int) -> _Queues:
    return _Queues(
        np.empty(num_slots, np.int32), np.empty(num_slots, np.int32), np.empty((2, num_slots)),
        np.empty((2, num_slots), np.int32), np.zeros(2, np.int64), np.zeros(2, np.int64), np.empty(num_slots),
        np.empty(num_slots, np.int32), np.empty(num_slots, np.int32), np.empty(num_slots, np.int32),
        np.empty(num_slots, np.int32),
    )  # fmt: skip


@inner
def _most_tasks(step: StepTasks) -> int:
    """Tasks of the largest launch."""
    most = 0
    for launch in range(len(step.gaps_us)):
        count = 0
        for span in range(step.launch_spans[launch], step.launch_spans[launch + 1]):
            count += step.spans[span, 1] - step.spans[span, 0]
        most = max(most, count)
    return most


@inner
def _list_launch(step: StepTasks, launch: int, order: np.ndarray, sizes: np.ndarray, record: Record) -> int:
    """Lists a launch's tasks and the bytes that each reads; returns their number."""
    tasks, lens, spans, tile_tokens = step.tasks, step.lens, step.spans, step.tile_tokens
    read_bytes, recorded = record.read_bytes, len(record.slot_of) > 0
    count = 0
    for span in range(step.launch_spans[launch], step.launch_spans[launch + 1]):
        for task in range(spans[span, 0], spans[span, 1]):
            row, begin, end = tasks[task, 0], np.int64(tasks[task, 3]), np.int64(tasks[task, 4])
            order[count] = task
            sizes[count] = (min(end * tile_tokens, lens[row]) - begin * tile_tokens) * step.token_bytes
            if recorded:
                read_bytes[task] = sizes[count]
            count += 1
    return count


@inner
def _run_side_by_side(order: np.ndarray, sizes: np.ndarray, slots: Slots, now: float, record: Record) -> float:
    """A launch all of whose CTAs start at once with a task each (order), of at most FEW_ENDS sizes.

    Returns the end of the last task, -1 for any other launch. Rows of equal length, one launch of split, are such.
    """
    slot_of, start_us, end_us = record.slot_of, record.start_us, record.end_us
    recorded = len(slot_of) > 0
    left = len(order)
    least = np.inf
    for size in sizes:
        least = min(least, size)
    start, read = now, 0.0
    now += slots.cta_us + slots.task_us
    for _ in range(FEW_ENDS):
        now += (least - read) / min(slots.alone, slots.shared / left)
        read, least = least, np.inf
        for slot in range(len(sizes)):
            size = sizes[slot]
            if size == read:
                left -= 1
                if recorded:
                    task = order[slot]
                    slot_of[task], start_us[task], end_us[task] = slot, start, now
            elif size > read:
                least = min(least, size)
        if left == 0:
            return now
    return -1.0


@inner
def _run_launch(launch: _Launch, slots: Slots, queues: _Queues, now: float, record: Record) -> float:
    """Runs a launch from `now` on; returns the end of its last task.

    One function and names of its own for the arrays, because every read of a tuple's field in a loop counts a
    reference.
    """
    order, sizes, cta_offsets = launch.order, launch.sizes, launch.cta_offsets
    next_of, members, free = queues.next_of, queues.members, queues.free
    wait_ends, wait_groups, heads, waiting = queues.wait_ends, queues.wait_groups, queues.heads, queues.waiting
    read_keys, read_groups = queues.read_keys, queues.read_groups
    place_of, stop_of = queues.place_of, queues.stop_of
    slot_of, start_us, end_us = record.slot_of, record.start_us, record.end_us
    num_slots, recorded = slots.num_slots, len(record.slot_of) > 0
    num_free = min(launch.ctas, num_slots)
    for slot in range(num_free):
        free[slot] = slot
        place_of[slot] = stop_of[slot] = 0
    upcoming = 0  # CTA
    reading, groups = np.int64(0), np.int64(0)  # slots, and groups; bare zeros would compile twice
    clock = 0.0  # bytes read by a CTA that has read all along
    while True:
        # Every free slot starts the next task of its CTA, or of the next one.
        group, last, last_queue = 0, -1, 0
        for index in range(num_free):
            slot = free[index]
            fixed = slots.task_us
            queue = 0
            if place_of[slot] >= stop_of[slot]:
                if upcoming == launch.ctas:
                    continue
                place_of[slot], stop_of[slot] = upcoming, upcoming + 1
                if launch.strided:
                    stop_of[slot] = len(order)
                elif len(cta_offsets) > 0:
                    place_of[slot], stop_of[slot] = cta_offsets[upcoming], cta_offsets[upcoming + 1]
                upcoming += 1
                fixed += slots.cta_us
                queue = 1
            if recorded:
                slot_of[order[place_of[slot]]] = slot
                start_us[order[place_of[slot]]] = now
            if last >= 0 and queue == last_queue and sizes[place_of[slot]] == sizes[place_of[last]]:
                next_of[last] = slot
                members[group] += 1
            else:
                group = slot
                members[group] = 1
                ring = heads[queue] + waiting[queue]
                if ring >= num_slots:
                    ring -= num_slots
                wait_ends[queue, ring] = now + fixed
                wait_groups[queue, ring] = group
                waiting[queue] += 1
            next_of[slot] = -1
            last, last_queue = slot, queue
        num_free = 0
        if not (waiting[0] or waiting[1] or groups):
            return now
        # The next event: a group's fixed cost ends and it reads, or the groups that have least to read end.
        speed = min(slots.alone, slots.shared / max(1, reading))
        read_end = now + (read_keys[0] - clock) / speed if groups else np.inf
        queue = 0
        if not waiting[0] or (waiting[1] and wait_ends[1, heads[1]] < wait_ends[0, heads[0]]):
            queue = 1
        if waiting[queue] and wait_ends[queue, heads[queue]] <= read_end:
            wait_end = wait_ends[queue, heads[queue]]
            clock += max(0.0, wait_end - now) * speed
            now = max(now, wait_end)
            group = wait_groups[queue, heads[queue]]
            heads[queue] += 1
            if heads[queue] == num_slots:
                heads[queue] = 0
            waiting[queue] -= 1
            push(read_keys, read_groups, groups, clock + sizes[place_of[group]], group)
            groups += 1
            reading += members[group]
            continue
        now = max(now, read_end)
        clock = read_keys[0]
        while groups and read_keys[0] == clock:
            slot = pop(read_keys, read_groups, groups)
            groups -= 1
            while slot >= 0:
                if recorded:
                    end_us[order[place_of[slot]]] = now
                place_of[slot] += launch.stride
                num_free = _insert_ascending(free, num_free, slot)
                slot = next_of[slot]
        reading -= num_free


@inner
def _insert_ascending(free: np.ndarray, num_free: int, slot: int) -> int:
    """Adds a slot to free[:num_free]; returns their number."""
    place = num_free
    while place > 0 and free[place - 1] > slot:
        free[place] = free[place - 1]
        place -= 1
    free[place] = slot
    return num_free + 1


@allocating
def run_tasks(step: StepTasks, slots: Slots, now: float, record: Record) -> float:
    """Runs every launch after the one before, the first one's CTAs starting at `now`; returns the last gap's end."""
    most = _most_tasks(step)
    order, sizes = np.empty(most, np.int32), np.empty(most)  # of the running launch
    queues = _new_queues(slots.num_slots)
    for launch in range(len(step.gaps_us)):
        count = _list_launch(step, launch, order, sizes, record)
        ctas = count
        if len(step.cta_offsets) > 0 and count > 0:
            ctas = len(step.cta_offsets) - 1
        if step.strided:
            ctas = min(ctas, slots.num_slots)
        done = -1.0
        if 0 < count == ctas <= slots.num_slots:
            done = _run_side_by_side(order[:count], sizes[:count], slots, now, record)
        if done < 0.0:
            stride = slots.num_slots if step.strided else 1
            running = _Launch(order[:count], sizes[:count], step.cta_offsets, ctas, stride, step.strided)
            done = _run_launch(running, slots, queues, now, record)
        now = done + step.gaps_us[launch]
    return now
