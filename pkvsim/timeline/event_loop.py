"""The compiled event loop of pkvsim.timeline.timeline."""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import inner
from pkvsim.pricing.constants import compiled

FEW_ENDS = 8  # a launch with no more distinct task sizes needs no heap


@inner
def _push(keys: np.ndarray, slots: np.ndarray, size: int, key: float, slot: int) -> None:
    """Adds to a heap of `size` entries, least key first; equal keys in the order of slots."""
    place = size
    while place > 0:
        parent = (place - 1) // 2
        if keys[parent] < key or (keys[parent] == key and slots[parent] < slot):
            break
        keys[place] = keys[parent]
        slots[place] = slots[parent]
        place = parent
    keys[place] = key
    slots[place] = slot


@inner
def _pop(keys: np.ndarray, slots: np.ndarray, size: int) -> int:
    """Takes the least entry off a heap of `size` entries and returns its slot."""
    first = slots[0]
    size -= 1
    place = 0
    # Down to a leaf along the lesser children, chosen without a branch, which no predictor would guess; then the last
    # entry moves up from there, seldom far.
    while 2 * place + 2 < size:
        child = 2 * place + 1
        less = keys[child + 1] < keys[child]
        same = keys[child + 1] == keys[child]
        child += less | (same & (slots[child + 1] < slots[child]))
        keys[place] = keys[child]
        slots[place] = slots[child]
        place = child
    if 2 * place + 1 < size:
        child = 2 * place + 1
        keys[place] = keys[child]
        slots[place] = slots[child]
        place = child
    _push(keys, slots, place, keys[size], slots[size])
    return first


@inner
def _fill_launch(
    tasks: np.ndarray, lens: np.ndarray, tile_tokens: int, token_bytes: float, spans: np.ndarray, order: np.ndarray,
    sizes: np.ndarray,
) -> int:  # fmt: skip
    """Lists the tasks of the launch of these spans [num_spans, 2] and the bytes that each reads; returns their
    number."""
    count = 0
    for span in range(len(spans)):
        for task in range(spans[span, 0], spans[span, 1]):
            row, begin, end = tasks[task, 0], np.int64(tasks[task, 3]), np.int64(tasks[task, 4])
            order[count] = task
            sizes[count] = (min(end * tile_tokens, lens[row]) - begin * tile_tokens) * token_bytes
            count += 1
    return count


@inner
def _run_side_by_side(
    order: np.ndarray, sizes: np.ndarray, fixed_us: float, alone: float, shared: float, now: float,
    record: bool, slot_of: np.ndarray, start_us: np.ndarray, end_us: np.ndarray,
) -> float:  # fmt: skip
    """run_tasks of one launch, all of whose CTAs start at once with a task each (order), of at most FEW_ENDS sizes.

    Returns the end of the last task, -1 for any other launch. Rows of equal length, one launch of split, are such.
    """
    left = len(order)
    least = np.inf
    for size in sizes:
        least = min(least, size)
    start, read = now, 0.0
    now += fixed_us
    for _ in range(FEW_ENDS):
        now += (least - read) / min(alone, shared / left)
        read, least = least, np.inf
        for slot in range(len(sizes)):
            size = sizes[slot]
            if size == read:
                left -= 1
                if record:
                    task = order[slot]
                    slot_of[task], start_us[task], end_us[task] = slot, start, now
            elif size > read:
                least = min(least, size)
        if left == 0:
            return now
    return -1.0


@compiled
def run_tasks(
    tasks: np.ndarray,  # [num_tasks, 5] int32, schedule.TASK_DTYPE's fields
    lens: np.ndarray,  # [batch_size] int32
    tile_tokens: int,
    token_bytes: float,  # of one token and KV head
    spans: np.ndarray,  # [num_spans, 2] int64, tasks [begin, end), span after span in launch order
    launch_spans: np.ndarray,  # [num_launches + 1] int64, launch i holds spans [launch_spans[i], launch_spans[i + 1])
    cta_offsets: np.ndarray,  # [num_ctas + 1] int32, of the only launch: CTA i runs its tasks [.., ..); empty: one each
    strided: bool,  # a CTA a slot at most, CTA b of a launch running its tasks b, b + num_slots, ..; no cta_offsets
    gaps_us: np.ndarray,  # [num_launches] float64, from a launch's last task to the next launch, or to the end
    num_slots: int,
    cta_us: float,  # fixed cost of a CTA, before its first task
    task_us: float,  # fixed cost of a task
    alone: float,  # bytes per us of one CTA
    shared: float,  # bytes per us of all
    now: float,  # when the first launch's CTAs start
    slot_of: np.ndarray,  # [num_tasks] int32, out; or empty, like the next three, where nobody asks
    start_us: np.ndarray,  # [num_tasks] float64, out
    end_us: np.ndarray,  # [num_tasks] float64, out
    read_bytes: np.ndarray,  # [num_tasks] float64, out
) -> float:
    """Runs every launch after the one before; returns the end of the last gap."""
    record = len(slot_of) > 0
    most = 0  # tasks of a launch
    for launch in range(len(gaps_us)):
        count = 0
        for span in range(launch_spans[launch], launch_spans[launch + 1]):
            count += spans[span, 1] - spans[span, 0]
        most = max(most, count)
    order, sizes = np.empty(most, np.int32), np.empty(most)  # of the running launch
    # Slots that start tasks of one size at the same moment end them together: such a group is one entry of a queue, by
    # its first slot, and a list of slots from there.
    next_of, members = np.empty(num_slots, np.int32), np.empty(num_slots, np.int32)
    # Groups in their fixed cost, by its end: it is the same for all that start a CTA, and for all that go on with one,
    # so that two queues are in order as they are. Rings of [2, num_slots].
    wait_ends, wait_groups = np.empty((2, num_slots)), np.empty((2, num_slots), np.int32)
    heads, waiting = np.zeros(2, np.int64), np.zeros(2, np.int64)
    read_keys, read_groups = np.empty(num_slots), np.empty(num_slots, np.int32)  # reading, by the virtual clock's end
    place_of, stop_of = np.empty(num_slots, np.int32), np.empty(num_slots, np.int32)  # a slot's places in order
    free = np.empty(num_slots, np.int32)  # slots that have ended a task now, ascending
    stride = num_slots if strided else 1
    for launch in range(len(gaps_us)):
        count = _fill_launch(
            tasks, lens, tile_tokens, token_bytes, spans[launch_spans[launch] : launch_spans[launch + 1]], order, sizes
        )
        if record:
            for place in range(count):
                read_bytes[order[place]] = sizes[place]
        ctas = count
        if len(cta_offsets) > 0 and count > 0:
            ctas = len(cta_offsets) - 1
        if strided:
            ctas = min(ctas, num_slots)
        if 0 < count == ctas <= num_slots:
            done = _run_side_by_side(
                order[:count], sizes[:count], cta_us + task_us, alone, shared, now, record, slot_of, start_us, end_us
            )
            if done >= 0.0:
                now = done + gaps_us[launch]
                continue
        num_free = min(ctas, num_slots)
        for slot in range(num_free):
            free[slot] = slot
            place_of[slot] = stop_of[slot] = 0
        upcoming = 0  # CTA
        reading, groups = 0, 0  # slots, and groups of them
        clock = 0.0
        while True:
            group, last, last_queue = 0, -1, 0
            for index in range(num_free):
                slot = free[index]
                fixed = task_us
                queue = 0
                if place_of[slot] >= stop_of[slot]:
                    if upcoming == ctas:
                        continue
                    if strided:
                        place_of[slot], stop_of[slot] = upcoming, count
                    elif len(cta_offsets) > 0:
                        place_of[slot], stop_of[slot] = cta_offsets[upcoming], cta_offsets[upcoming + 1]
                    else:
                        place_of[slot], stop_of[slot] = upcoming, upcoming + 1
                    upcoming += 1
                    fixed += cta_us
                    queue = 1
                if record:
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
                break
            speed = min(alone, shared / max(1, reading))
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
                _push(read_keys, read_groups, groups, clock + sizes[place_of[group]], group)
                groups += 1
                reading += members[group]
                continue
            now = max(now, read_end)
            clock = read_keys[0]
            while groups and read_keys[0] == clock:
                slot = _pop(read_keys, read_groups, groups)
                groups -= 1
                while slot >= 0:
                    if record:
                        end_us[order[place_of[slot]]] = now
                    place_of[slot] += stride
                    place = num_free
                    while place > 0 and free[place - 1] > slot:
                        free[place] = free[place - 1]
                        place -= 1
                    free[place] = slot
                    num_free += 1
                    slot = next_of[slot]
            reading -= num_free
        now += gaps_us[launch]
    return now
