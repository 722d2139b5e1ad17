"""The time of a step's tasks, cut in each of the ways that routes have. Compiled.

`c` is a row of constants (RouteModel.to_row), `one` the us per token of one CTA alone, `all_` the us per token and running
CTA where the bandwidth is shared, `sm` the us per token that the arithmetic of one SM takes. Lengths come sorted, longest
first, without zeros.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.numba_cache import inner
from pkvsim.pricing_base import LAUNCH, MIN_SPLIT, SEGMENT, STRIDED, TASK, TILE, compiled, merge_us
from pkvsim.schedule import MIN_COST, SEGMENT_COST, balanced_ranges, engine_part_cost

FULLEST_SM_SIGMAS = 0.75  # tasks that all start at once: the fullest SM's load over the mean, in standard deviations
LOCKSTEP_WAVES = 4  # equal tasks start and end together for so long; then their waves have drifted apart
QUEUE_WAVES = (1, 2, 4, 8, 16)  # tasks per CTA slot among which the workqueue's splits are chosen
_ranges = inner(balanced_ranges)
_part_cost = inner(engine_part_cost)


@inner
def total_tokens(ordered: np.ndarray) -> int:
    """The sum. A function of its own, because Numba compiles callers' callees twice for a sum that begins as 0."""
    tokens = 0
    for length in ordered:
        tokens += length
    return tokens


@inner
def bucket_splits(heads: int, length: int, slots: int, c: np.ndarray) -> int:
    """Splits of rows of one length whose (row, KV head) pairs number `heads`: what fills the CTA slots."""
    return max(1, min(slots // heads, int(length / c[MIN_SPLIT])))


@inner
def even_us(
    ordered: np.ndarray, num_kv_heads: int, slots: int, splits: int, tile: int, num_sms: int, c: np.ndarray, one: float,
    all_: float, sm: float,
) -> float:  # fmt: skip
    """Rows in `splits` splits each (at most their tiles)."""
    rows = len(ordered)
    tokens = float(total_tokens(ordered) * num_kv_heads)
    tasks = 0
    for length in ordered:
        tasks += num_kv_heads * min(splits, -(-length // tile))
    longest = ordered[0] / min(splits, -(-ordered[0] // tile))
    if tasks <= slots:
        us = c[TASK]
        fullest = 0.0  # some SM has this many tasks of at least this size
        running = 0
        squares = 0.0
        for row in range(rows):
            row_splits = min(splits, -(-ordered[row] // tile))
            running += num_kv_heads * row_splits
            size = ordered[row] / row_splits
            shorter = 0.0
            if row + 1 < rows:
                shorter = min(size, ordered[row + 1] / min(splits, -(-ordered[row + 1] // tile)))
            us += (size - shorter) * max(one, running * all_)
            fullest = max(fullest, -(-running // num_sms) * size * sm)
            squares += num_kv_heads * row_splits * size * size
        return max(us, fullest, sm_load(float(tasks), tokens, squares, num_sms) * sm)
    if ordered[0] == ordered[rows - 1] and tasks < LOCKSTEP_WAVES * slots:
        full = tasks // slots
        rest = tasks - full * slots
        us = full * max(c[TASK] + longest * one, longest * slots * all_)
        if rest:
            us += c[TASK] + longest * max(one, rest * all_)
        return us
    return waves_us(tokens, float(tasks), longest, slots, c[TASK], one, all_)


@inner
def sm_load(tasks: float, tokens: float, squares: float, num_sms: int) -> float:
    """Tokens of the fullest SM, where tasks of this sum and sum of squares fall on the SMs at random."""
    variance = max(0.0, squares / tasks - (tokens / tasks) ** 2)
    return tokens / num_sms + FULLEST_SM_SIGMAS * math.sqrt(variance * tasks / num_sms)


@inner
def waves_us(tokens: float, tasks: float, longest: float, slots: int, task_us: float, one: float, all_: float) -> float:
    """More tasks than slots: the bandwidth's time or the slots', and a tail in which the tasks run out.

    A slot that is busy with a task's fixed cost reads nothing, so others have more of the bandwidth meanwhile.
    """
    tail = 0.5 * (task_us + longest * one) * min(1.0, one / (all_ * slots))
    busy = max(tokens * all_, (tasks * task_us + tokens * one) / slots)
    return max(task_us + longest * one, busy + tail)


@inner
def strided_us(
    ordered: np.ndarray, num_kv_heads: int, splits: int, proportional: bool, slots: int, c: np.ndarray, one: float,
    all_: float,
) -> float:  # fmt: skip
    """A CTA on every slot, CTA b taking tasks b, b + CTAs, ..: all start together and end by what each has to read.

    A row's num_kv_heads * splits tasks are alike, so that it gives every CTA the same number of them and a few
    neighbours, round the ring, one more: differences in `loads` say where these begin and end. splits: of the longest
    row where proportional, of every row otherwise.
    """
    tile = int(c[TILE])
    tasks = 0
    for length in ordered:
        tasks += num_kv_heads * _row_splits(length, ordered[0], splits, proportional, tile)
    ctas = min(slots, tasks)
    us = c[TASK] * tasks / ctas
    if ordered[0] == ordered[-1]:
        size = ordered[0] * num_kv_heads * len(ordered) / tasks
        more = tasks % ctas  # CTAs with one task more than the others
        return us + size * (tasks // ctas * max(one, ctas * all_) + (max(one, more * all_) if more else 0.0))
    loads = np.zeros(ctas + 1)  # tokens
    first = 0
    for length in ordered:
        own = _row_splits(length, ordered[0], splits, proportional, tile)
        size = length / own
        rounds = num_kv_heads * own // ctas
        end = first + num_kv_heads * own - rounds * ctas
        loads[0] += rounds * size
        loads[first] += size
        if end >= ctas:
            end -= ctas
            loads[0] += size
        loads[end] -= size
        first = end
    for cta in range(1, ctas):
        loads[cta] += loads[cta - 1]
    sort_descending(loads, ctas)
    for cta in range(ctas):
        less = loads[cta + 1] if cta + 1 < ctas else 0.0
        us += (loads[cta] - less) * max(one, (cta + 1) * all_)
    return us


@inner
def _row_splits(length: int, longest: int, splits: int, proportional: bool, tile: int) -> int:
    if proportional:
        splits = (length * splits + longest - 1) // longest
    return min(splits, (length + tile - 1) // tile)


@inner
def sort_descending(values: np.ndarray, used: int) -> None:
    """Sorts values[:used] in place. A shell sort: arrays are short, and np.sort takes a second to compile."""
    gap = 1
    while gap < used:
        gap = 3 * gap + 1
    while gap > 0:
        for index in range(gap, used):
            value = values[index]
            place = index
            while place >= gap and values[place - gap] < value:
                values[place] = values[place - gap]
                place -= gap
            values[place] = value
        gap //= 3


@inner
def chunk_count(ordered: np.ndarray, chunk: int) -> int:
    count = 0
    for length in ordered:
        count += (length + chunk - 1) // chunk
    return count


@compiled
def chunk_tokens(ordered: np.ndarray, most: int, tile: int, least: float) -> int:
    """The least chunk, in whole tiles, of which the rows give at most `most`; the longest row's length if none does."""
    rows = len(ordered)
    longest = -(-ordered[0] // tile)
    if rows >= most:
        return longest * tile
    low = max(1, int(math.ceil(least / tile)))
    high = max(low, longest)
    while low < high:
        middle = (low + high) // 2
        if chunk_count(ordered, middle * tile) > most:
            low = middle + 1
        else:
            high = middle
    return low * tile


@inner
def chunks_us(
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
    tokens = float((full * chunk + rest_tokens) * num_kv_heads)
    if tasks > slots:
        return waves_us(tokens, float(tasks), float(chunk), slots, c[TASK], one, all_)
    rest = rest_tokens / rests if rests else 0.0
    us = rest * max(one, (full + rests) * num_kv_heads * all_) + c[TASK]
    if full:
        us += (chunk - rest) * max(one, full * num_kv_heads * all_)
    squares = num_kv_heads * (full * float(chunk) * chunk + rests * rest * rest)
    load = sm_load(float(tasks), tokens, squares, num_sms)
    return max(us, -(-full * num_kv_heads // num_sms) * chunk * sm, load * sm)


@inner
def proportional_count(ordered: np.ndarray, splits: int) -> int:
    """Tasks of one KV head with row i in ceil(length_i * splits / longest) splits."""
    longest = ordered[0]
    count = 0
    for length in ordered:
        count += (length * splits + longest - 1) // longest
    return count


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
    lengths: np.ndarray, ordered: np.ndarray, num_kv_heads: int, slots: int, c: np.ndarray, one: float, all_: float, sm: float,
    state: float, memory: float, num_sms: int, pinned: int,
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
    state: float, memory: float,
) -> tuple[float, int]:  # fmt: skip
    tile = int(c[TILE])
    tiles = 0
    for length in ordered:
        tiles += (length + tile - 1) // tile
    heads = len(ordered) * num_kv_heads
    total_cost = num_kv_heads * tiles + heads * SEGMENT_COST
    even = (ordered[0] + tile - 1) // tile == (ordered[-1] + tile - 1) // tile
    ranges, _ = _ranges(total_cost, heads, slots, SEGMENT_COST, MIN_COST, _part_cost(num_kv_heads), even)
    us = tokens * num_kv_heads * max(all_, one / ranges) + c[TASK] + c[SEGMENT] * max(1.0, heads / ranges)
    if heads % ranges or ordered[0] != ordered[-1]:
        splits = max(2, int(math.ceil(ordered[0] * ranges / (tokens * num_kv_heads))))
        return us + merge_us(c, float(splits), float(min(heads * splits, 2 * ranges)), state, memory), splits
    return us, 1
