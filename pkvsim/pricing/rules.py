"""The time of a step by the three rules that choose their cuts by price or launch by launch. Compiled.

Arguments as in pkvsim.pricing.tasks; `state`: bytes of a task's partial state, `memory`: bytes per us.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner
from pkvsim.pricing.constants import LAUNCH, MIN_SPLIT, SEGMENT, STRIDED, TASK, TILE, merge_us
from pkvsim.pricing.rows import bucket_splits, proportional_count
from pkvsim.pricing.tasks import chunks_us, even_us, strided_us
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.make import balanced_ranges

QUEUE_WAVES = (1, 2, 4, 8, 16)  # tasks per CTA slot among which the workqueue's splits are chosen
_ranges = inner(balanced_ranges)


@inner
def best_queue(
    ordered: np.ndarray, tokens: int, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float, sm: float,
    state: float, memory: float, num_sms: int,
) -> tuple[float, int]:  # fmt: skip
    """The workqueue, rows split in proportion to length, at the cheapest of a few task counts that fill whole waves of
    the slots: (us, splits of the longest row)."""
    best = math.inf
    best_splits = 0
    rows = len(ordered)
    scale = ordered[0] / tokens  # splits of the longest row by tasks, rounding aside
    for waves in QUEUE_WAVES:
        most = waves * slots // num_kv_heads
        # The most splits that give at most `most` tasks a KV head; rounding up adds fewer tasks than rows.
        splits = max(1, int((most - rows) * scale))
        high = max(splits, int(min(most * scale, ordered[0] / c[MIN_SPLIT])))
        if splits > ordered[0] / c[MIN_SPLIT]:
            splits = high = max(1, int(ordered[0] / c[MIN_SPLIT]))
        if rows >= most:
            splits = high = 1
        while splits < high:
            middle = (splits + high + 1) // 2
            if proportional_count(ordered, middle) <= most:
                splits = middle
            else:
                high = middle - 1
        if splits == best_splits:
            continue
        tasks = num_kv_heads * proportional_count(ordered, splits)
        chunk = -(-ordered[0] // splits)
        price = c[LAUNCH]
        if c[STRIDED]:
            price += strided_us(ordered, num_kv_heads, splits, True, slots, c, one, all_)
        else:
            price += chunks_us(ordered, num_kv_heads, slots, chunk, tasks, num_sms, c, one, all_, sm)
        if splits > 1:
            price += merge_us(c, float(splits), float(tasks), state, memory)
        if price < best:
            best = price
            best_splits = splits
    return best, best_splits


@inner
def buckets_us(
    lengths: np.ndarray, ordered: np.ndarray, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float,
    sm: float, state: float, memory: float, num_sms: int, pinned: int,
) -> tuple[float, int]:  # fmt: skip
    """The paper's split: one launch after the other for every distinct length; (us, splits of the longest row).

    lengths [rows], longest first; ordered [rows]: the tokens that each of these rows reads, alike where lengths are.
    """
    us = -c[LAUNCH]  # the first launch is in fixed_us
    longest_splits = 0
    tile = int(c[TILE])
    begin = 0
    while begin < len(ordered):
        end = begin
        while end < len(ordered) and lengths[end] == lengths[begin]:
            end += 1
        heads = (end - begin) * num_kv_heads
        splits = pinned
        if pinned == 0:
            splits = bucket_splits(heads, ordered[begin], slots, c)
        splits = min(splits, -(-ordered[begin] // tile))
        us += c[LAUNCH]
        if c[STRIDED]:
            us += strided_us(ordered[begin:end], num_kv_heads, splits, False, slots, c, one, all_)
        else:
            us += even_us(ordered[begin:end], num_kv_heads, slots, splits, tile, num_sms, c, one, all_, sm)
        if splits > 1:
            us += c[LAUNCH] + merge_us(c, float(splits), float(heads * splits), state, memory)
        if begin == 0:
            longest_splits = splits
        begin = end
    return us, longest_splits


@inner
def balanced_us(
    ordered: np.ndarray, tokens: int, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float,
    state: float, memory: float, costs: BalancedCosts,
) -> tuple[float, int]:  # fmt: skip
    tile = int(c[TILE])
    tiles = 0
    for length in ordered:
        tiles += (length + tile - 1) // tile
    heads = len(ordered) * num_kv_heads
    total_cost = num_kv_heads * tiles + heads * costs.segment
    even = (ordered[0] + tile - 1) // tile == (ordered[-1] + tile - 1) // tile
    ranges, _ = _ranges(total_cost, heads, slots, costs, even)
    us = tokens * num_kv_heads * max(all_, one / ranges) + c[TASK] + c[SEGMENT] * max(1.0, heads / ranges)
    if heads % ranges or ordered[0] != ordered[-1]:
        splits = max(2, int(math.ceil(ordered[0] * ranges / (tokens * num_kv_heads))))
        return us + merge_us(c, float(splits), float(min(heads * splits, 2 * ranges)), state, memory), splits
    return us, 1
