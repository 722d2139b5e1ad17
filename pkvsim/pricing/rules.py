"""A step's time by each rule: how the rule cuts rows, what the tasks take, and the merge. Compiled.

Lengths come sorted, longest first, without zeros, in tokens that are read. Every rule gives (us, splits of the longest
row), from `start_us` on where it takes one, else beside the ramp-up.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner
from pkvsim.pricing.constants import EVEN, LAUNCH, MIN_SPLIT, QUEUE, SEGMENT, STRIDED, TASK, merge_us
from pkvsim.pricing.cuts import bucket_splits, chunk_count, chunk_tokens, proportional_count
from pkvsim.pricing.layer import Layer
from pkvsim.pricing.task_times import chunks_us, even_us, strided_us
from pkvsim.schedule.make import balanced_ranges

QUEUE_WAVES = (1, 2, 4, 8, 16)  # tasks per CTA slot among which the workqueue's splits are chosen
ROUNDING = 1e-9  # far above what sums of so few terms lose
_ranges = inner(balanced_ranges)


@inner
def evenly(ordered: np.ndarray, pinned: int, start_us: float, layer: Layer) -> tuple[float, int]:
    """Every row in as many splits: one (whole), what fills the slots (even), or what is pinned (the workqueue)."""
    constants = layer.constants
    heads = len(ordered) * layer.num_kv_heads
    splits = 1
    if layer.rule == EVEN:
        splits = min(max(1, int(ordered[0] / constants[MIN_SPLIT])), max(1, layer.slots // heads))
    elif layer.rule == QUEUE:
        splits = pinned
    if layer.rule == QUEUE and constants[STRIDED]:
        us = start_us + strided_us(ordered, splits, False, layer)
    else:
        us = start_us + even_us(ordered, splits, layer)
    if layer.rule == QUEUE:
        us += constants[LAUNCH]
    if splits > 1:
        us += merge_us(constants, layer.columns, layer.state_bytes, float(splits), float(heads * splits))
    return us, splits


@inner
def in_chunks(ordered: np.ndarray, start_us: float, layer: Layer) -> tuple[float, int]:
    """FlashInfer: the least chunk whose tasks fit the CTA slots, unsplit when the rows alone fill them."""
    chunk = chunk_tokens(ordered, layer.slots // layer.num_kv_heads, layer.tile, layer.constants[MIN_SPLIT])
    splits = -(-ordered[0] // chunk)
    if splits <= 1:
        return start_us + even_us(ordered, splits, layer), splits
    tasks = layer.num_kv_heads * chunk_count(ordered, chunk)
    us = start_us + chunks_us(ordered, chunk, tasks, layer)
    return us + merge_us(layer.constants, layer.columns, layer.state_bytes, float(splits), float(tasks)), splits


@inner
def by_queue(ordered: np.ndarray, tokens: int, layer: Layer) -> tuple[float, int]:
    """The workqueue, rows split in proportion to length, at the cheapest of a few task counts that fill whole waves of
    the slots. tokens: the sum of the lengths."""
    constants = layer.constants
    best = math.inf
    best_splits = 0
    num_rows = len(ordered)
    reading = constants[LAUNCH] + tokens * layer.num_kv_heads * layer.shared_us
    scale = ordered[0] / tokens  # splits of the longest row by tasks, rounding aside
    for waves in QUEUE_WAVES:
        most_tasks = waves * layer.slots // layer.num_kv_heads
        # The most splits that give no more tasks a KV head; rounding up adds fewer tasks than rows.
        splits = max(1, int((most_tasks - num_rows) * scale))
        high = max(splits, int(min(most_tasks * scale, ordered[0] / constants[MIN_SPLIT])))
        if splits > ordered[0] / constants[MIN_SPLIT]:
            splits = high = max(1, int(ordered[0] / constants[MIN_SPLIT]))
        if num_rows >= most_tasks:
            splits = high = 1
        # With more splits there are more partial states to merge, of which the fewest rule out most of the counts
        # beyond the first before these are looked for.
        if splits > 1 and reading + _merging(splits, int(splits / scale), layer) >= best * (1.0 + 2 * ROUNDING):
            continue
        while splits < high:
            middle = (splits + high + 1) // 2
            if proportional_count(ordered, middle) <= most_tasks:
                splits = middle
            else:
                high = middle - 1
        if splits == best_splits:
            continue
        count = proportional_count(ordered, splits)
        tasks, merging = layer.num_kv_heads * count, _merging(splits, count, layer)
        # No count takes less than the bandwidth does, its merge, and a strided CTA's tasks one after the other.
        least = reading + merging
        if constants[STRIDED] and layer.tile <= constants[MIN_SPLIT]:
            least += constants[TASK] * tasks / min(layer.slots, tasks)
        if least * (1.0 - ROUNDING) >= best:
            continue
        price = constants[LAUNCH]
        if constants[STRIDED]:
            price += strided_us(ordered, splits, True, layer)
        else:
            price += chunks_us(ordered, -(-ordered[0] // splits), tasks, layer)
        price += merging
        if price < best:
            best = price
            best_splits = splits
    return best, best_splits


@inner
def _merging(splits: int, tasks: int, layer: Layer) -> float:
    """Merging so many tasks of each KV head, `splits` of them of the longest row; no time where no row is split."""
    if splits <= 1:
        return 0.0
    return merge_us(layer.constants, layer.columns, layer.state_bytes, float(splits), float(layer.num_kv_heads * tasks))


@inner
def by_buckets(lengths: np.ndarray, reads: np.ndarray, pinned: int, layer: Layer) -> tuple[float, int]:
    """The paper's split: one launch after the other for every distinct length.

    lengths [rows], longest first; reads [rows]: the tokens that each of these rows reads, alike where lengths are.
    """
    constants = layer.constants
    us = -constants[LAUNCH]  # the first launch is in fixed_us
    longest_splits = 0
    begin = 0
    while begin < len(reads):
        end = begin
        while end < len(reads) and lengths[end] == lengths[begin]:
            end += 1
        heads = (end - begin) * layer.num_kv_heads
        splits = pinned
        if pinned == 0:
            splits = bucket_splits(heads, reads[begin], layer.slots, constants[MIN_SPLIT])
        splits = min(splits, -(-reads[begin] // layer.tile))
        us += constants[LAUNCH]
        if constants[STRIDED]:
            us += strided_us(reads[begin:end], splits, False, layer)
        else:
            us += even_us(reads[begin:end], splits, layer)
        if splits > 1:
            tasks = float(heads * splits)
            us += constants[LAUNCH] + merge_us(constants, layer.columns, layer.state_bytes, float(splits), tasks)
        if begin == 0:
            longest_splits = splits
        begin = end
    return us, longest_splits


@inner
def by_ranges(ordered: np.ndarray, tokens: int, layer: Layer) -> tuple[float, int]:
    """Balanced: ranges of equal cost, one a CTA slot. tokens: the sum of the lengths."""
    constants, costs = layer.constants, layer.costs
    tiles = 0
    for length in ordered:
        tiles += (length + layer.tile - 1) // layer.tile
    heads = len(ordered) * layer.num_kv_heads
    total_cost = layer.num_kv_heads * tiles + heads * costs.segment
    alike = (ordered[0] + layer.tile - 1) // layer.tile == (ordered[-1] + layer.tile - 1) // layer.tile
    ranges, _ = _ranges(total_cost, heads, layer.slots, costs, alike)
    us = tokens * layer.num_kv_heads * max(layer.shared_us, layer.alone_us / ranges)
    us = us + constants[TASK] + constants[SEGMENT] * max(1.0, heads / ranges)
    if heads % ranges or ordered[0] != ordered[-1]:
        splits = max(2, int(math.ceil(ordered[0] * ranges / (tokens * layer.num_kv_heads))))
        partials = float(min(heads * splits, 2 * ranges))
        return us + merge_us(constants, layer.columns, layer.state_bytes, float(splits), partials), splits
    return us, 1
