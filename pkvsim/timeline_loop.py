"""The compiled event loop of pkvsim.timeline."""
from __future__ import annotations

import numpy as np

from pkvsim.numba_cache import inner
from pkvsim.pricing_base import compiled

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
    key = keys[size - 1]
    slot = slots[size - 1]
    size -= 1
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (keys[right] < keys[child] or (keys[right] == keys[child] and slots[right] < slots[child])):
            child = right
        if key < keys[child] or (key == keys[child] and slot < slots[child]):
            break
        keys[place] = keys[child]
        slots[place] = slots[child]
        place = child
    keys[place] = key
    slots[place] = slot
    return first


@compiled
def stride_tasks(
    order: np.ndarray,  # [num_tasks] int64, tasks in launch order
    launch_tasks: np.ndarray,  # [num_launches + 1] int64, launch i holds order[launch_tasks[i] : launch_tasks[i + 1]]
    num_slots: int,
    places: np.ndarray,  # [num_tasks] int64, out: tasks, CTA by CTA
    offsets: np.ndarray,  # [num_tasks + 1] int64, out: the CTAs' into places
    launch_ctas: np.ndarray,  # [num_launches + 1] int64, out: the launches' into the CTAs
) -> int:
    """Deals every launch's tasks out to at most num_slots CTAs in turn; returns the number of CTAs."""
    ctas, used = 0, 0
    offsets[0] = launch_ctas[0] = 0
    for launch in range(len(launch_tasks) - 1):
        begin, end = launch_tasks[launch], launch_tasks[launch + 1]
        for cta in range(min(num_slots, end - begin)):
            task = begin + cta
            while task < end:  # a range would divide to find its length
                places[used] = order[task]
                used += 1
                task += num_slots
            ctas += 1
            offsets[ctas] = used
        launch_ctas[launch + 1] = ctas
    return ctas


@compiled
def read_bytes(
    tasks: np.ndarray,  # [num_tasks, 5] int32, schedule.TASK_DTYPE's fields
    lens: np.ndarray,  # [batch_size] int32
    tile_tokens: int,
    token_bytes: float,
    out: np.ndarray,  # [num_tasks] float64, out
) -> None:
    """The bytes of KV that every task reads."""
    for task in range(len(tasks)):
        row, begin, end = tasks[task, 0], np.int64(tasks[task, 3]), np.int64(tasks[task, 4])
        out[task] = (min(end * tile_tokens, lens[row]) - begin * tile_tokens) * token_bytes


@inner
def _run_side_by_side(
    order: np.ndarray, cta_offsets: np.ndarray, places: np.ndarray, task_bytes: np.ndarray, num_slots: int,
    fixed_us: float, alone: float, shared: float, now: float,
    slot_of: np.ndarray, start_us: np.ndarray, end_us: np.ndarray,
) -> float:  # fmt: skip
    """run_tasks of one launch, all of whose CTAs (order) start at once with a task each, of at most FEW_ENDS sizes.

    Returns the end of the last task, -1 for any other launch. Rows of equal length, one launch of split, are such.
    """
    left = len(order)
    if left == 0 or left > num_slots:
        return -1.0
    least = np.inf
    for cta in order:
        if cta_offsets[cta + 1] - cta_offsets[cta] != 1:
            return -1.0
        least = min(least, task_bytes[places[cta_offsets[cta]]])
    start, read = now, 0.0
    now += fixed_us
    for _ in range(FEW_ENDS):
        now += (least - read) / min(alone, shared / left)
        read, least = least, np.inf
        for slot in range(len(order)):
            task = places[cta_offsets[order[slot]]]
            size = task_bytes[task]
            if size == read:
                slot_of[task], start_us[task], end_us[task] = slot, start, now
                left -= 1
            elif size > read:
                least = min(least, size)
        if left == 0:
            return now
    return -1.0


@compiled
def run_tasks(
    order: np.ndarray,  # [num_ctas] int64, CTAs in the order in which slots take them
    cta_offsets: np.ndarray,  # [num_ctas + 1] int64, CTA i runs places[cta_offsets[i] : cta_offsets[i + 1]]
    places: np.ndarray,  # [num_tasks] int64, the tasks, CTA by CTA
    launch_ctas: np.ndarray,  # [num_launches + 1] int64, launch i holds order[launch_ctas[i] : launch_ctas[i + 1]]
    gaps_us: np.ndarray,  # [num_launches] float64, from a launch's last task to the next launch, or to the end
    task_bytes: np.ndarray,  # [num_tasks] float64
    num_slots: int,
    cta_us: float,  # fixed cost of a CTA, before its first task
    task_us: float,  # fixed cost of a task
    alone: float,  # bytes per us of one CTA
    shared: float,  # bytes per us of all
    now: float,  # when the first launch's CTAs start
    slot_of: np.ndarray,  # [num_tasks] int32, out
    start_us: np.ndarray,  # [num_tasks] float64, out
    end_us: np.ndarray,  # [num_tasks] float64, out
) -> float:
    """Runs every launch after the one before; returns the end of the last gap."""
    # In their fixed cost, by its end: it is the same for all that start a CTA, and for all that go on with one, so that
    # two queues are in order as they are. Rings of [2, num_slots].
    wait_ends, wait_slots = np.empty((2, num_slots)), np.empty((2, num_slots), np.int64)
    heads, sizes = np.zeros(2, np.int64), np.zeros(2, np.int64)
    read_keys, read_slots = np.empty(num_slots), np.empty(num_slots, np.int64)  # reading, by the virtual clock's end
    task_at = np.empty(num_slots, np.int64)
    last_at = np.empty(num_slots, np.int64)
    for launch in range(len(gaps_us)):
        upcoming = launch_ctas[launch]
        stop = launch_ctas[launch + 1]
        done = _run_side_by_side(
            order[upcoming:stop], cta_offsets, places, task_bytes, num_slots, cta_us + task_us, alone, shared, now,
            slot_of, start_us, end_us,
        )  # fmt: skip
        if done >= 0.0:
            now = done + gaps_us[launch]
            continue
        reading = 0
        clock = 0.0
        idle = 0  # slots not yet used by this launch
        while True:
            slot = -1
            if idle < num_slots and upcoming < stop:
                slot = idle
                idle += 1
                task_at[slot] = last_at[slot] = 0
            elif sizes[0] or sizes[1] or reading:
                speed = min(alone, shared / max(1, reading))
                read_end = now + (read_keys[0] - clock) / speed if reading else np.inf
                queue = 0
                if not sizes[0] or (sizes[1] and wait_ends[1, heads[1]] < wait_ends[0, heads[0]]):
                    queue = 1
                if sizes[queue] and wait_ends[queue, heads[queue]] <= read_end:
                    wait_end = wait_ends[queue, heads[queue]]
                    clock += max(0.0, wait_end - now) * speed
                    now = max(now, wait_end)
                    ready = wait_slots[queue, heads[queue]]
                    heads[queue] = (heads[queue] + 1) % num_slots
                    sizes[queue] -= 1
                    _push(read_keys, read_slots, reading, clock + task_bytes[places[task_at[ready]]], ready)
                    reading += 1
                    continue
                now = max(now, read_end)
                clock = read_keys[0]
                slot = _pop(read_keys, read_slots, reading)
                reading -= 1
                end_us[places[task_at[slot]]] = now
                task_at[slot] += 1
            else:
                break
            fixed = task_us
            queue = 0
            if task_at[slot] == last_at[slot]:
                if upcoming == stop:
                    continue
                cta = order[upcoming]
                upcoming += 1
                task_at[slot] = cta_offsets[cta]
                last_at[slot] = cta_offsets[cta + 1]
                fixed += cta_us
                queue = 1
            slot_of[places[task_at[slot]]] = slot
            start_us[places[task_at[slot]]] = now
            place = (heads[queue] + sizes[queue]) % num_slots
            wait_ends[queue, place] = now + fixed
            wait_slots[queue, place] = slot
            sizes[queue] += 1
        now += gaps_us[launch]
    return now
