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
LOCKSTEP_WAVES = 4  # equal tasks start and end together for so long; then their waves have drifted apart
QUEUE_WAVES = (1, 2, 3, 4)  # tasks per CTA slot among which the workqueue's splits are chosen
(BANDWIDTH, CTA_READ, FIXED, LAUNCH, TASK, SEGMENT, MERGE, MERGE_SPLIT, MERGE_SPEED, PLAN, L2_SPEED, L2_SIZE, SM_HEADS, BASE_HEADS, HEAD_PAD,
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
def price_steps(
    lengths: np.ndarray, offsets: np.ndarray, owners: np.ndarray, shapes: np.ndarray, element_bytes: int, num_sms: int,
    constants: np.ndarray, prices_us: np.ndarray,
) -> None:  # fmt: skip
    """The mean price of every measurement's steps, into prices_us [num_measurements]."""
    steps = np.zeros(len(prices_us))
    prices_us[:] = 0.0
    for step in range(len(owners)):
        owner = owners[step]
        heads, group, head_dim, pinned = shapes[owner]
        rows = lengths[offsets[step] : offsets[step + 1]]
        us, _ = price_route(rows, heads, group, head_dim, element_bytes, num_sms, constants, pinned)
        prices_us[owner] += us
        steps[owner] += 1
    prices_us /= steps


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
    return min(speed, num_sms * sm_gb_s(c, group_size, kv_element_bytes))


@numba.njit(cache=True)
def sm_gb_s(c: np.ndarray, group_size: int, kv_element_bytes: int) -> float:
    """GB/s of KV that the arithmetic of one SM keeps up with."""
    heads = c[BASE_HEADS] + math.ceil(group_size / c[HEAD_PAD]) * c[HEAD_PAD]
    return c[SM_HEADS] / heads * kv_element_bytes / 2


@numba.njit(cache=True)
def _merge_us(c: np.ndarray, splits: float, tasks: float, state_bytes: float, memory: float) -> float:
    """Merging `tasks` partial states of one KV head's group each, at most `splits` of them of one row and head."""
    return c[MERGE] + splits * (c[MERGE_SPLIT] + state_bytes / (c[MERGE_SPEED] * 1e3)) + 2 * tasks * state_bytes / memory


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
    alone = min(c[CTA_READ], sm_gb_s(c, group_size, kv_element_bytes))
    one = token_bytes / min(alone * 1e3, beta)  # us a token, one CTA alone
    all_ = token_bytes / beta  # us a token and running CTA, bandwidth shared
    state = group_size * (2 + head_dim) * float(PARTIAL_ELEMENT_BYTES)  # bytes of a task's partial state
    slots = max(1, int(num_sms * c[CTAS_PER_SM]))
    heads = rows * num_kv_heads
    memory = c[BANDWIDTH] * 1e3  # bytes per us, whatever the arithmetic
    row_us = heads * group_size * head_dim * kv_element_bytes * 2.0 / memory  # q read, out written
    sm = token_bytes / (sm_gb_s(c, group_size, kv_element_bytes) * 1e3)  # us a token, by the arithmetic of one SM
    us = c[FIXED] + row_us
    rule = int(c[0])
    if rule == BALANCED:
        busy, splits = _balanced_us(ordered, tokens, num_kv_heads, group_size, slots, c, one, all_, state, memory)
        return us + busy, splits
    if rule == BUCKETS:
        busy, splits = _buckets_us(ordered, num_kv_heads, slots, c, one, all_, sm, state, memory, num_sms, pinned)
        return us + busy, splits
    if rule == QUEUE and pinned == 0:
        return _best_queue(ordered, tokens, num_kv_heads, slots, c, one, all_, sm, state, memory, num_sms, us)
    splits = 1
    if rule == CHUNK:
        chunk = _chunk_tokens(ordered, slots // num_kv_heads, int(c[TILE]), c[MIN_SPLIT])
        splits = -(-ordered[0] // chunk)
        if splits > 1:
            tasks = num_kv_heads * _chunk_count(ordered, chunk)
            us += _chunks_us(ordered, num_kv_heads, slots, chunk, tasks, num_sms, c, one, all_, sm)
            return us + _merge_us(c, splits, tasks, state, memory), splits
    elif rule == EVEN or rule == QUEUE:
        most = max(1, int(ordered[0] / c[MIN_SPLIT]))
        splits = min(most, max(1, slots // heads)) if rule == EVEN else pinned
    us += _even_us(ordered, num_kv_heads, slots, splits, int(c[TILE]), num_sms, c, one, all_, sm)
    if rule == QUEUE:
        us += c[LAUNCH]
    if splits > 1:
        us += _merge_us(c, splits, heads * splits, state, memory)
    return us, splits


@numba.njit(cache=True)
def _even_us(
    ordered: np.ndarray, num_kv_heads: int, slots: int, splits: int, tile: int, num_sms: int, c: np.ndarray, one: float,
    all_: float, sm: float,
) -> float:  # fmt: skip
    """Rows in `splits` splits each (at most their tiles)."""
    rows = len(ordered)
    tokens = 0
    tasks = 0
    for length in ordered:
        tokens += length
        tasks += num_kv_heads * min(splits, -(-length // tile))
    longest = ordered[0] / min(splits, -(-ordered[0] // tile))
    if tasks <= slots:
        us = c[TASK]
        fullest = 0.0  # some SM has this many tasks of at least this size
        running = 0
        for row in range(rows):
            row_splits = min(splits, -(-ordered[row] // tile))
            running += num_kv_heads * row_splits
            size = ordered[row] / row_splits
            shorter = 0.0
            if row + 1 < rows:
                shorter = min(size, ordered[row + 1] / min(splits, -(-ordered[row + 1] // tile)))
            us += (size - shorter) * max(one, running * all_)
            fullest = max(fullest, -(-running // num_sms) * size * sm)
        return max(us, fullest)
    if ordered[0] == ordered[rows - 1] and tasks < LOCKSTEP_WAVES * slots:
        full = tasks // slots
        rest = tasks - full * slots
        us = full * max(c[TASK] + longest * one, longest * slots * all_)
        if rest:
            us += c[TASK] + longest * max(one, rest * all_)
        return us
    return _waves_us(tokens * num_kv_heads, tasks, longest, slots, c[TASK], one, all_)


@numba.njit(cache=True)
def _waves_us(tokens: float, tasks: float, longest: float, slots: int, task_us: float, one: float, all_: float) -> float:
    """More tasks than slots: the bandwidth's time or the slots', and a tail in which the tasks run out.

    A slot that is busy with a task's fixed cost reads nothing, so others have more of the bandwidth meanwhile.
    """
    tail = 0.5 * (task_us + longest * one) * min(1.0, one / (all_ * slots))
    busy = max(tokens * all_, (tasks * task_us + tokens * one) / slots)
    return max(task_us + longest * one, busy + tail)


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
    ordered: np.ndarray, num_kv_heads: int, slots: int, chunk: int, tasks: int, num_sms: int, c: np.ndarray, one: float,
    all_: float, sm: float,
) -> float:  # fmt: skip
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
    if tasks > slots:
        return _waves_us((full * chunk + rest_tokens) * num_kv_heads, tasks, chunk, slots, c[TASK], one, all_)
    rest = rest_tokens / rests if rests else 0.0
    us = rest * max(one, (full + rests) * num_kv_heads * all_) + c[TASK]
    if full:
        us += (chunk - rest) * max(one, full * num_kv_heads * all_)
    return max(us, -(-full * num_kv_heads // num_sms) * chunk * sm)


@numba.njit(cache=True)
def _best_queue(
    ordered: np.ndarray, tokens: int, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float,
    sm: float, state: float, memory: float, num_sms: int, us: float,
) -> tuple[float, int]:  # fmt: skip
    """The workqueue at the cheapest of a few task sizes: (us, splits of the longest row)."""
    best = math.inf
    splits = 1
    for waves in QUEUE_WAVES:
        chunk = int(max(c[MIN_SPLIT], math.ceil(tokens * num_kv_heads / (waves * slots))))
        tasks = num_kv_heads * _chunk_count(ordered, chunk)
        price = us + c[LAUNCH] + _chunks_us(ordered, num_kv_heads, slots, chunk, tasks, num_sms, c, one, all_, sm)
        if chunk < ordered[0]:
            price += _merge_us(c, -(-ordered[0] // chunk), tasks, state, memory)
        if price < best:
            best = price
            splits = -(-ordered[0] // chunk)
    return best, splits


@numba.njit(cache=True)
def _buckets_us(
    ordered: np.ndarray, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float, sm: float,
    state: float, memory: float, num_sms: int, pinned: int,
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
        us += c[LAUNCH] + _even_us(ordered[begin:end], num_kv_heads, slots, splits, tile, num_sms, c, one, all_, sm)
        if splits > 1:
            us += c[LAUNCH] + _merge_us(c, splits, heads * splits, state, memory)
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
    all_: float, state: float, memory: float,
) -> tuple[float, int]:  # fmt: skip
    tile = int(c[TILE])
    tiles = 0
    for length in ordered:
        tiles += (length + tile - 1) // tile
    heads = len(ordered) * num_kv_heads
    segment_cost = int(c[SEGMENT_COST])
    total_cost = num_kv_heads * tiles + heads * segment_cost
    ranges = _ranges(total_cost, heads, slots, segment_cost, balanced_min_cost(group_size))
    us = tokens * num_kv_heads * max(all_, one / ranges) + c[TASK] + c[SEGMENT] * max(1.0, heads / ranges)
    if heads % ranges or ordered[0] != ordered[-1]:
        splits = max(2, int(math.ceil(ordered[0] * ranges / (tokens * num_kv_heads))))
        return us + _merge_us(c, splits, min(heads * splits, 2 * ranges), state, memory), splits
    return us, 1
