"""The time of a step's tasks, cut in each of the ways that routes have. Compiled.

`c` is a row of constants (RouteModel.to_row), `one` the us per token of one CTA alone, `all_` the us per token and
running CTA where the bandwidth is shared, `sm` the us per token that the arithmetic of one SM takes. Lengths come
sorted, longest first, without zeros.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner
from pkvsim.pricing.constants import TASK, TILE
from pkvsim.pricing.rows import sort_descending, splits_of_row, total_tokens

FULLEST_SM_SIGMAS = 0.75  # tasks that all start at once: the fullest SM's load over the mean, in standard deviations
LOCKSTEP_WAVES = 4  # equal tasks start and end together for so long; then their waves have drifted apart


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
        tasks += num_kv_heads * splits_of_row(length, ordered[0], splits, proportional, tile)
    ctas = min(slots, tasks)
    us = c[TASK] * tasks / ctas
    if ordered[0] == ordered[-1]:
        size = ordered[0] * num_kv_heads * len(ordered) / tasks
        more = tasks % ctas  # CTAs with one task more than the others
        return us + size * (tasks // ctas * max(one, ctas * all_) + (max(one, more * all_) if more else 0.0))
    loads = np.zeros(ctas + 1)  # tokens
    first = 0
    for length in ordered:
        own = splits_of_row(length, ordered[0], splits, proportional, tile)
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
