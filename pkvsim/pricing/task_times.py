"""How long tasks take on CTA slots that share the bandwidth, cut in each of the ways that routes have. Compiled.

Lengths come sorted, longest first, without zeros, in tokens that are read.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner, inner_allocating
from pkvsim.pricing.constants import TASK
from pkvsim.pricing.cuts import splits_of_row, total_tokens
from pkvsim.pricing.layer import Layer

FULLEST_SM_SIGMAS = 0.75  # tasks that all start at once: the fullest SM's load over the mean, in standard deviations
LOCKSTEP_WAVES = 4  # equal tasks start and end together for so long; then their waves have drifted apart
# Share of the longest task by which the mean one falls short of it from where on waves have drifted apart at once. The
# best of 0.03 to 0.15 against the timeline, in random steps of 1 to 4 waves on three GPUs: measurements have hardly any
# of that kind.
DRIFTED = 0.05


@inner
def even_us(ordered: np.ndarray, splits: int, layer: Layer) -> float:
    """Rows in `splits` splits each (at most their tiles)."""
    num_rows = len(ordered)
    task_us = layer.constants[TASK]
    tokens = float(total_tokens(ordered) * layer.num_kv_heads)
    tasks = 0
    for length in ordered:
        tasks += layer.num_kv_heads * min(splits, -(-length // layer.tile))
    longest = ordered[0] / min(splits, -(-ordered[0] // layer.tile))
    if tasks <= layer.slots:
        us = task_us
        fullest = 0.0  # some SM has this many tasks of at least this size
        running = 0
        squares = 0.0
        for row in range(num_rows):
            own = min(splits, -(-ordered[row] // layer.tile))
            running += layer.num_kv_heads * own
            size = ordered[row] / own
            shorter = 0.0
            if row + 1 < num_rows:
                shorter = min(size, ordered[row + 1] / min(splits, -(-ordered[row + 1] // layer.tile)))
            us += (size - shorter) * max(layer.alone_us, running * layer.shared_us)
            fullest = max(fullest, -(-running // layer.num_sms) * size * layer.arithmetic_us)
            squares += layer.num_kv_heads * own * size * size
        return max(us, fullest, sm_load(float(tasks), tokens, squares, layer.num_sms) * layer.arithmetic_us)
    drifted = 1.0
    if tasks < LOCKSTEP_WAVES * layer.slots:
        drifted = min(1.0, max(0.0, (1.0 - tokens / (tasks * longest)) / DRIFTED))
    us = 0.0
    if drifted > 0.0:
        waves = waves_us(tokens, float(tasks), longest, layer)
        if tasks < LOCKSTEP_WAVES * layer.slots:
            waves = max(waves, fullest_slot_us(ordered, splits, tasks, layer))
        us += drifted * waves
    if drifted < 1.0:
        us += (1.0 - drifted) * lockstep_us(tasks, longest, layer)
    return us


@inner
def lockstep_us(tasks: int, longest: float, layer: Layer) -> float:
    """More tasks than slots, all as the longest: wave after wave."""
    task_us = layer.constants[TASK]
    full = tasks // layer.slots
    rest = tasks - full * layer.slots
    us = full * max(task_us + longest * layer.alone_us, longest * layer.slots * layer.shared_us)
    if rest:
        us += task_us + longest * max(layer.alone_us, rest * layer.shared_us)
    return us


@inner
def fullest_slot_us(ordered: np.ndarray, splits: int, tasks: int, layer: Layer) -> float:
    """Of w full waves and a task more, w + 1 tasks fall to some slot, each no shorter than the shortest of them all."""
    waves = (tasks - 1) // layer.slots
    counted = 0
    shortest = float(ordered[0])
    for length in ordered:
        own = min(splits, -(-length // layer.tile))
        shortest = min(shortest, length / own)
        counted += layer.num_kv_heads * own
        if counted > waves * layer.slots:
            break
    return (waves + 1) * (layer.constants[TASK] + shortest * layer.alone_us)


@inner
def sm_load(tasks: float, tokens: float, squares: float, num_sms: int) -> float:
    """Tokens of the fullest SM, where tasks of this sum and sum of squares fall on the SMs at random."""
    variance = max(0.0, squares / tasks - (tokens / tasks) ** 2)
    return tokens / num_sms + FULLEST_SM_SIGMAS * math.sqrt(variance * tasks / num_sms)


@inner
def waves_us(tokens: float, tasks: float, longest: float, layer: Layer) -> float:
    """More tasks than slots: the bandwidth's time or the slots', and a tail in which the tasks run out.

    A slot that is busy with a task's fixed cost reads nothing, so others have more of the bandwidth meanwhile.
    """
    task_us = layer.constants[TASK]
    last_us = task_us + longest * layer.alone_us
    tail = 0.5 * last_us * min(1.0, layer.alone_us / (layer.shared_us * layer.slots))
    busy = max(tokens * layer.shared_us, (tasks * task_us + tokens * layer.alone_us) / layer.slots)
    return max(last_us, busy + tail)


@inner_allocating
def strided_us(ordered: np.ndarray, splits: int, proportional: bool, layer: Layer) -> float:
    """A CTA on every slot, CTA b taking tasks b, b + CTAs, ..: all start together and end by what each has to read.

    A row's num_kv_heads * splits tasks are alike, so that it gives every CTA the same number of them and a few
    neighbours, round the ring, one more: differences in `loads` say where these begin and end. splits: of the longest
    row where proportional, of every row otherwise.
    """
    tasks = 0
    for length in ordered:
        tasks += layer.num_kv_heads * splits_of_row(length, ordered[0], splits, proportional, layer.tile)
    ctas = min(layer.slots, tasks)
    us = layer.constants[TASK] * tasks / ctas
    if ordered[0] == ordered[-1]:
        size = ordered[0] * layer.num_kv_heads * len(ordered) / tasks
        more = tasks % ctas  # CTAs with one task more than the others
        last_us = max(layer.alone_us, more * layer.shared_us) if more else 0.0
        return us + size * (tasks // ctas * max(layer.alone_us, ctas * layer.shared_us) + last_us)
    loads = np.zeros(ctas + 1)  # tokens
    first = 0
    for length in ordered:
        own = splits_of_row(length, ordered[0], splits, proportional, layer.tile)
        size = length / own
        rounds = layer.num_kv_heads * own // ctas
        end = first + layer.num_kv_heads * own - rounds * ctas
        loads[0] += rounds * size
        loads[first] += size
        if end >= ctas:
            end -= ctas
            loads[0] += size
        loads[end] -= size
        first = end
    # Neighbours with the same load are one entry: a few rows give far fewer of them than there are CTAs.
    counts = np.empty(ctas, np.int64)
    used = 0
    load = 0.0
    for cta in range(ctas):
        step = loads[cta]
        load += step
        if cta == 0 or step != 0.0:
            loads[used] = load
            counts[used] = 0
            used += 1
        counts[used - 1] += 1
    _sort_loads(loads, counts, used)
    running = 0
    for at in range(used):
        running += counts[at]
        less = loads[at + 1] if at + 1 < used else 0.0
        us += (loads[at] - less) * max(layer.alone_us, running * layer.shared_us)
    return us


@inner
def _sort_loads(loads: np.ndarray, counts: np.ndarray, used: int) -> None:
    """Sorts loads[:used], the largest first, and counts with them; a shell sort as in pkvsim.pricing.cuts."""
    gap = 1
    while gap < used:
        gap = 3 * gap + 1
    while gap > 0:
        for index in range(gap, used):
            load, count = loads[index], counts[index]
            place = index
            while place >= gap and loads[place - gap] < load:
                loads[place], counts[place] = loads[place - gap], counts[place - gap]
                place -= gap
            loads[place], counts[place] = load, count
        gap //= 3


@inner
def chunks_us(ordered: np.ndarray, chunk: int, tasks: int, layer: Layer) -> float:
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
    heads = layer.num_kv_heads
    tokens = float((full * chunk + rest_tokens) * heads)
    if tasks > layer.slots:
        return waves_us(tokens, float(tasks), float(chunk), layer)
    rest = rest_tokens / rests if rests else 0.0
    us = rest * max(layer.alone_us, (full + rests) * heads * layer.shared_us) + layer.constants[TASK]
    if full:
        us += (chunk - rest) * max(layer.alone_us, full * heads * layer.shared_us)
    squares = heads * (full * float(chunk) * chunk + rests * rest * rest)
    load = sm_load(float(tasks), tokens, squares, layer.num_sms)
    return max(us, -(-full * heads // layer.num_sms) * chunk * layer.arithmetic_us, load * layer.arithmetic_us)
