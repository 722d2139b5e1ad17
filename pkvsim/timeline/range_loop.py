"""The compiled loop of steps whose CTAs read at speeds of their own: one range of tasks each, then their merges."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import outer


class RangeTasks(NamedTuple):
    """The tasks of a step, range after range; a CTA runs a range, and all start together."""

    cta_offsets: np.ndarray  # [num_ctas + 1] int32
    fixed_us: np.ndarray  # [num_tasks] float64, before a task reads, in which it takes no bandwidth
    sizes: np.ndarray  # [num_tasks] float64 bytes
    speeds: np.ndarray  # [num_tasks] float64, bytes per us at most


class RangeMerges(NamedTuple):
    """The outputs that are merged of several states, range after range, each behind the last task of its range."""

    cta_offsets: np.ndarray  # [num_ctas + 1] int32, merges of each range
    awaits_begin: np.ndarray  # [num_merges] int32: it waits for the tasks awaited[begin:end]
    awaits_end: np.ndarray  # [num_merges] int32
    awaited: np.ndarray  # [num_awaited] int32, tasks
    us: np.ndarray  # [num_merges] float64


@outer
def run_ranges(
    tasks: RangeTasks,
    of_read: np.ndarray,  # [num_tasks] bool: the task is bound by its products where it reads at its own speed
    shared: float,  # bytes per us of all CTAs
    read_share: float,  # of a read while that is used up, in shares of another task
    now: float,
    start_us: np.ndarray,  # [num_tasks] float64, out
    end_us: np.ndarray,  # [num_tasks] float64, out
) -> tuple[float, float, float]:
    """Runs all ranges from `now` on. Returns the times in which the bandwidth is used up, in which it is not while a
    read computes, and in which others read as fast as each can.

    Each reading CTA gets its speed or, where all together ask for more than there is, its share of what those leave
    that ask for less than theirs.
    """
    saturated, computing, alone = 0.0, 0.0, 0.0
    offsets, fixed_us, sizes, speeds = tasks.cta_offsets, tasks.fixed_us, tasks.sizes, tasks.speeds
    ctas = len(offsets) - 1
    place = np.empty(ctas, np.int64)  # the CTA's task
    reads_at = np.empty(ctas)  # when its fixed cost ends
    left = np.zeros(ctas)  # bytes
    running = 0
    for cta in range(ctas):
        place[cta] = offsets[cta]
        reads_at[cta] = np.inf
        if offsets[cta] < offsets[cta + 1]:
            first = offsets[cta]
            start_us[first] = now
            reads_at[cta], left[cta] = now + fixed_us[first], sizes[first]
            running += 1
    reading = np.zeros(ctas, np.bool_)
    while running > 0:
        # One share of those who would read more: it rises from the least there may be, since the slow leave some.
        level, before = np.inf, -1
        while True:
            slow, rest, count, shares = 0, shared, 0, 0.0
            for cta in range(ctas):
                if reading[cta]:
                    count += 1
                    weight = read_share if of_read[place[cta]] else 1.0
                    if speeds[place[cta]] <= level * weight:
                        slow += 1
                        rest -= speeds[place[cta]]
                    else:
                        shares += weight
            if level == np.inf:
                if rest >= 0.0:
                    break
                level = 0.0
            elif slow == before or slow == count:
                break
            else:
                before = slow
                level = max(level, rest / shares)
        step = np.inf
        reads, any_read = False, False
        for cta in range(ctas):
            if reading[cta]:
                any_read = True
                reads = reads or of_read[place[cta]]
                speed = min(speeds[place[cta]], level * (read_share if of_read[place[cta]] else 1.0))
                step = min(step, left[cta] / speed)
            elif reads_at[cta] < np.inf:
                step = min(step, reads_at[cta] - now)
        now += step
        if any_read:
            if level < np.inf:
                saturated += step
            elif reads:
                computing += step
            else:
                alone += step
        for cta in range(ctas):
            if reading[cta]:
                rate = min(speeds[place[cta]], level * (read_share if of_read[place[cta]] else 1.0))
                if left[cta] / rate <= step * (1.0 + 1e-12):  # of quotients, as products of the smallest are 0
                    task = place[cta]
                    end_us[task] = now
                    reading[cta] = False
                    reads_at[cta] = np.inf
                    place[cta] += 1
                    if place[cta] < offsets[cta + 1]:
                        start_us[place[cta]] = now
                        reads_at[cta], left[cta] = now + fixed_us[place[cta]], sizes[place[cta]]
                    else:
                        running -= 1
                else:
                    left[cta] -= rate * step
            elif reads_at[cta] <= now:
                reading[cta] = True
                reads_at[cta] = np.inf
    return saturated, computing, alone


@outer
def run_merges(merges: RangeMerges, cta_offsets: np.ndarray, end_us: np.ndarray, now: float) -> float:
    """When the last output is merged, from `now` on. cta_offsets, end_us: of the tasks, as run_ranges left them."""
    last = now
    for cta in range(len(cta_offsets) - 1):
        at = now
        if cta_offsets[cta] < cta_offsets[cta + 1]:
            at = end_us[cta_offsets[cta + 1] - 1]
        for merge in range(merges.cta_offsets[cta], merges.cta_offsets[cta + 1]):
            for index in range(merges.awaits_begin[merge], merges.awaits_end[merge]):
                at = max(at, end_us[merges.awaited[index]])
            at += merges.us[merge]
        last = max(last, at)
    return last
