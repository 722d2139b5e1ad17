"""The closed form of a step's kernel time on every route, compiled: no schedule is built and nothing simulated.

A step's tasks share the memory bandwidth: each running CTA gets the lesser of what one CTA can read and its share.
Tasks that all fit the CTA slots start together and advance alike, so their time follows from the sorted lengths;
more tasks than slots run in waves. pkvsim.timeline simulates what is summed up here.
"""
from __future__ import annotations

import math

import numba
import numpy as np

from pkvsim.route_model import CONSTANTS, RULES
from pkvsim.schedule import balanced_ranges

PARTIAL_ELEMENT_BYTES = 4  # partial states are FP32: m, l and head_dim sums per query head
QUEUE_WAVES = (1, 2, 3, 4)  # tasks per CTA slot among which the workqueue's splits are chosen
(BANDWIDTH, CTA_READ, FIXED, LAUNCH, TASK, SEGMENT, MERGE, PLAN, L2_SPEED, L2_SIZE, SM_HEADS, BASE_HEADS, HEAD_PAD,
 CTAS_PER_SM, TILE, MIN_SPLIT, SEGMENT_COST) = range(1, 1 + len(CONSTANTS))  # fmt: skip
WHOLE, CHUNK, EVEN, BUCKETS, QUEUE, BALANCED = range(len(RULES))
_ranges = numba.njit(cache=True)(balanced_ranges)


@numba.njit(cache=True)
def price_routes(
    seq_lens: np.ndarray,  # [batch_size] int32 or int64, zeros allowed
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    kv_element_bytes: int,
    num_sms: int,
    constants: np.ndarray,  # [num_routes, NUM_CONSTANTS] float64, as constants_matrix gives them
    prices_us: np.ndarray,  # [num_routes] float64, out: kernel time of one layer
    splits: np.ndarray,  # [num_routes] int64, out: splits of the longest row
) -> None:
    """Prices one step on every route; a row of NaN costs infinity with 0 splits.

    Host planning is no part of it: a step of L layers takes L * prices_us[r] + constants[r, PLAN]. For the workqueue a
    row of length l takes ceil(l * splits / longest) splits, for the paper's split each length its own formula.
    """
    ordered = sorted_lengths(seq_lens)
    for route in range(len(constants)):
        if math.isnan(constants[route, BANDWIDTH]):
            prices_us[route] = math.inf
            splits[route] = 0
        else:
            prices_us[route], splits[route] = price_route(
                ordered, num_kv_heads, group_size, head_dim, kv_element_bytes, num_sms, constants[route], 0
            )


@numba.njit(cache=True)
def sorted_lengths(seq_lens: np.ndarray) -> np.ndarray:
    """The lengths above 0, longest first, int64."""
    ordered = np.empty(len(seq_lens), np.int64)
    used = 0
    descending = True
    for length in seq_lens:
        if length > 0:
            descending = descending and (used == 0 or ordered[used - 1] >= length)
            ordered[used] = length
            used += 1
    ordered = ordered[:used]
    return ordered if descending else np.sort(ordered)[::-1].copy()


@numba.njit(cache=True)
def shared_gb_s(c: np.ndarray, kv_bytes: float, group_size: int, kv_element_bytes: int, num_sms: int) -> float:
    """What all CTAs together read: memory, L2 for what it holds, and arithmetic, whichever is least."""
    speed = c[BANDWIDTH]
    if c[L2_SIZE] > 0:
        hit = min(1.0, max(0.0, 2.0 - kv_bytes / (c[L2_SIZE] * 1e6)))
        speed = 1.0 / (hit / max(speed, c[L2_SPEED]) + (1.0 - hit) / speed)
    heads = c[BASE_HEADS] + math.ceil(group_size / c[HEAD_PAD]) * c[HEAD_PAD]
    return min(speed, num_sms * c[SM_HEADS] / heads * kv_element_bytes / 2)


@numba.njit(cache=True)
def price_route(
    ordered: np.ndarray,  # [rows] int64 > 0, longest first
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    kv_element_bytes: int,
    num_sms: int,
    c: np.ndarray,  # [NUM_CONSTANTS] float64
    pinned: int,
) -> tuple[float, int]:
    """(kernel us of one layer, splits of the longest row). pinned: splits of every row, 0 to choose."""
    rows = len(ordered)
    if rows == 0:
        return c[FIXED], 1
    tokens = 0
    for length in ordered:
        tokens += length
    token_bytes = 2.0 * head_dim * kv_element_bytes
    kv_bytes = tokens * num_kv_heads * token_bytes
    beta = shared_gb_s(c, kv_bytes, group_size, kv_element_bytes, num_sms) * 1e3  # bytes per us
    one = token_bytes / min(c[CTA_READ] * 1e3, beta)  # us a token, one CTA alone
    all_ = token_bytes / beta  # us a token and running CTA, bandwidth shared
    state_us = group_size * (2 + head_dim) * PARTIAL_ELEMENT_BYTES * 2.0 / beta  # a partial state written and read
    slots = max(1, int(num_sms * c[CTAS_PER_SM]))
    heads = rows * num_kv_heads
    row_us = heads * group_size * head_dim * kv_element_bytes * 2.0 / beta  # q read, out written
    us = c[FIXED] + row_us
    rule = int(c[0])
    if rule == BALANCED:
        return us + _balanced_us(ordered, tokens, num_kv_heads, group_size, slots, c, one, all_, state_us), 1
    if rule == BUCKETS:
        busy, splits = _buckets_us(ordered, num_kv_heads, slots, c, one, all_, state_us, pinned)
        return us + busy, splits
    if rule == QUEUE and pinned == 0:
        return _best_queue(ordered, tokens, num_kv_heads, slots, c, one, all_, state_us, us)
    splits = 1
    if rule == CHUNK:
        chunk = _chunk_tokens(ordered, slots // num_kv_heads, int(c[TILE]), c[MIN_SPLIT])
        splits = -(-ordered[0] // chunk)
        if splits > 1:
            tasks = num_kv_heads * _chunk_count(ordered, chunk)
            us += _chunks_us(ordered, num_kv_heads, slots, chunk, tasks, c, one, all_)
            return us + c[MERGE] + tasks * state_us, splits
    elif rule == EVEN or rule == QUEUE:
        most = max(1, int(ordered[0] / c[MIN_SPLIT]))
        splits = min(most, max(1, slots // heads)) if rule == EVEN else pinned
    us += _even_us(ordered, num_kv_heads, slots, splits, int(c[TILE]), c, one, all_)
    if rule == QUEUE:
        us += c[LAUNCH]
    if splits > 1:
        us += c[MERGE] + heads * splits * state_us
    return us, splits


@numba.njit(cache=True)
def _even_us(
    ordered: np.ndarray, num_kv_heads: int, slots: int, splits: int, tile: int, c: np.ndarray, one: float, all_: float
) -> float:
    """Rows in `splits` splits each (at most their tiles)."""
    rows = len(ordered)
    tokens = 0
    tasks = 0
    for length in ordered:
        tokens += length
        tasks += num_kv_heads * min(splits, -(-length // tile))
    longest = ordered[0] / min(splits, -(-ordered[0] // tile))
    task_us = c[TASK] * max(1.0, tasks / slots)
    if tasks <= slots:
        us = 0.0
        running = 0
        for row in range(rows):
            row_splits = min(splits, -(-ordered[row] // tile))
            running += num_kv_heads * row_splits
            size = ordered[row] / row_splits
            shorter = 0.0
            if row + 1 < rows:
                shorter = min(size, ordered[row + 1] / min(splits, -(-ordered[row + 1] // tile)))
            us += (size - shorter) * max(one, running * all_)
        return us + task_us
    if ordered[0] == ordered[rows - 1]:
        full = tasks // slots
        rest = tasks - full * slots
        us = full * longest * max(one, slots * all_)
        if rest:
            us += longest * max(one, rest * all_)
        return us + task_us
    return _waves_us(tokens * num_kv_heads, longest, slots, one, all_) + task_us


@numba.njit(cache=True)
def _waves_us(tokens: float, longest: float, slots: int, one: float, all_: float) -> float:
    """Unequal tasks on fewer slots: all the work at the slots' speed, and a tail in which they run out of it."""
    tail = 0.5 * longest * one * min(1.0, one / (all_ * slots))
    return max(longest * one, tokens * max(all_, one / slots) + tail)


@numba.njit(cache=True)
def _chunk_count(ordered: np.ndarray, chunk: int) -> int:
    count = 0
    for length in ordered:
        count += (length + chunk - 1) // chunk
    return count


@numba.njit(cache=True)
def _chunk_tokens(ordered: np.ndarray, most: int, tile: int, least: float) -> int:
    """The least chunk, in whole tiles, of which the rows give at most `most`; the longest row's length if none does."""
    rows = len(ordered)
    longest = -(-ordered[0] // tile)
    if rows >= most:
        return longest * tile
    low = max(1, int(math.ceil(least / tile)))
    high = max(low, longest)
    while low < high:
        middle = (low + high) // 2
        if _chunk_count(ordered, middle * tile) > most:
            low = middle + 1
        else:
            high = middle
    return low * tile


@numba.njit(cache=True)
def _chunks_us(
    ordered: np.ndarray, num_kv_heads: int, slots: int, chunk: int, tasks: int, c: np.ndarray, one: float, all_: float
) -> float:
    """Rows cut into whole chunks and a rest each; the rests are taken as equally long."""
    full = 0
    rests = 0
    rest_tokens = 0
    for length in ordered:
        whole = length // chunk
        full += whole
        if length > whole * chunk:
            rests += 1
            rest_tokens += length - whole * chunk
    task_us = c[TASK] * max(1.0, tasks / slots)
    if tasks > slots:
        return _waves_us((full * chunk + rest_tokens) * num_kv_heads, chunk, slots, one, all_) + task_us
    rest = rest_tokens / rests if rests else 0.0
    return (
        rest * max(one, (full + rests) * num_kv_heads * all_)
        + (chunk - rest) * max(one, full * num_kv_heads * all_) * (full > 0)
        + task_us
    )


@numba.njit(cache=True)
def _best_queue(
    ordered: np.ndarray, tokens: int, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float,
    state_us: float, us: float,
) -> tuple[float, int]:  # fmt: skip
    """The workqueue at the cheapest of a few task sizes: (us, splits of the longest row)."""
    best = math.inf
    splits = 1
    for waves in QUEUE_WAVES:
        chunk = int(max(c[MIN_SPLIT], math.ceil(tokens * num_kv_heads / (waves * slots))))
        tasks = num_kv_heads * _chunk_count(ordered, chunk)
        price = us + c[LAUNCH] + _chunks_us(ordered, num_kv_heads, slots, chunk, tasks, c, one, all_)
        if chunk < ordered[0]:
            price += c[MERGE] + tasks * state_us
        if price < best:
            best = price
            splits = -(-ordered[0] // chunk)
    return best, splits


@numba.njit(cache=True)
def _buckets_us(
    ordered: np.ndarray, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float, state_us: float,
    pinned: int,
) -> tuple[float, int]:  # fmt: skip
    """The paper's split: one launch after the other for every distinct length; (us, splits of the longest row)."""
    us = -c[LAUNCH]  # the first launch is in fixed_us
    longest_splits = 0
    tile = int(c[TILE])
    begin = 0
    while begin < len(ordered):
        end = begin
        while end < len(ordered) and ordered[end] == ordered[begin]:
            end += 1
        heads = (end - begin) * num_kv_heads
        splits = pinned
        if pinned == 0:
            splits = max(1, min(slots // heads, int(ordered[begin] / c[MIN_SPLIT])))
        splits = min(splits, -(-ordered[begin] // tile))
        us += c[LAUNCH] + _even_us(ordered[begin:end], num_kv_heads, slots, splits, tile, c, one, all_)
        if splits > 1:
            us += c[LAUNCH] + c[MERGE] + heads * splits * state_us
        if begin == 0:
            longest_splits = splits
        begin = end
    return us, longest_splits


@numba.njit(cache=True)
def balanced_min_cost(group_size: int) -> int:
    """Least cost of a range in tiles: a larger group's partial states are dearer to merge."""
    return min(32, max(8, 4 * group_size - 8))


@numba.njit(cache=True)
def _balanced_us(
    ordered: np.ndarray, tokens: int, num_kv_heads: int, group_size: int, slots: int, c: np.ndarray, one: float,
    all_: float, state_us: float,
) -> float:  # fmt: skip
    tile = int(c[TILE])
    tiles = 0
    for length in ordered:
        tiles += (length + tile - 1) // tile
    heads = len(ordered) * num_kv_heads
    segment_cost = int(c[SEGMENT_COST])
    total_cost = num_kv_heads * tiles + heads * segment_cost
    ranges = _ranges(total_cost, heads, slots, segment_cost, balanced_min_cost(group_size))
    us = tokens * num_kv_heads * max(all_, one / ranges) + c[TASK] + c[SEGMENT] * max(1.0, heads / ranges)
    if heads % ranges != 0 or ordered[0] != ordered[-1]:
        us += c[MERGE] + min(heads, ranges) * 2 * state_us
    return us
