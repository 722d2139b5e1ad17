"""The closed form of a balanced step whose rows read their common pages once, compiled: no schedule is built.

The schedule cuts its cost axis evenly (pkvsim.schedule.spans), but what a range of reads takes and what a range of rows
takes are not alike: the step ends with the slower kind, or with the bandwidth, and then with the merges of a range.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import inner
from pkvsim.pricing.constants import compiled
from pkvsim.schedule.costs import EIGHTHS, SHARED_COLUMNS, BalancedCosts, SharedCosts
from pkvsim.schedule.make import balanced_ranges

_ranges = inner(balanced_ranges)


class SharedLayer(NamedTuple):
    """One layer on the balanced route, as plain numbers."""

    num_kv_heads: int
    columns: int  # of a row: query heads of a KV head, times query tokens
    slots: int  # CTAs that run at a time
    tile: int  # tokens
    token_bytes: float  # of K and V of one KV head
    start_us: float  # before the first task
    segment_us: float  # of a row's segment
    read_us: float  # of a read's end, for each column
    row_us: float  # of merging an output
    alone: float  # bytes per us of one CTA
    reading: float  # bytes per us of one CTA in a read
    bandwidth: float  # bytes per us of all
    costs: BalancedCosts
    shared: SharedCosts


@compiled
def shared_us(
    lens: np.ndarray,  # [batch_size] int64
    group_of_row: np.ndarray,  # [batch_size] int64 as PrefixGroups.members, -1 where a row reads alone
    prefix_tokens: np.ndarray,  # [num_groups] int64
    layer: SharedLayer,
) -> float:
    """Kernel time of a layer. NaN where no two rows share."""
    groups, heads, shared, costs = len(prefix_tokens), layer.num_kv_heads, layer.shared, layer.costs
    most = shared.columns // layer.columns  # members of a read
    members = np.zeros(groups, np.int64)
    for group in group_of_row:
        if group >= 0:
            members[group] += 1
    total, spans, read_tokens, read_ends, longest_gap = 0, 0, 0, 0.0, 1
    costs_of, eighths_of = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    columns_of, span_cost_of = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    for group in range(groups):
        tiles = prefix_tokens[group] // layer.tile
        if members[group] < 2 or tiles == 0:
            members[group] = 0
            continue
        reads = -(-members[group] // most)
        columns_of[group] = -(-members[group] // reads) * layer.columns
        least = shared.again if reads > 1 else EIGHTHS
        eighths = max(least, -(-columns_of[group] * shared.tile // SHARED_COLUMNS))
        segment = max(1, costs.segment, -(-columns_of[group] * shared.segment // EIGHTHS))
        span_cost_of[group] = segment - (-tiles * eighths // EIGHTHS)
        costs_of[group] = reads * heads * span_cost_of[group]
        eighths_of[group] = eighths
        total += costs_of[group]
        spans += reads * heads
        read_tokens += reads * heads * tiles * layer.tile
        read_ends += reads * heads * columns_of[group] * layer.read_us
        longest_gap = max(longest_gap, segment - (-eighths // EIGHTHS))
    if spans == 0:
        return np.nan
    own_cost, own_spans, own_tokens, merged = 0, 0, 0, 0
    for row in range(len(lens)):
        group = group_of_row[row]
        is_member = group >= 0 and members[group] > 0
        skipped = prefix_tokens[group] // layer.tile * layer.tile if is_member else 0
        own = lens[row] - skipped
        if own <= 0 and not is_member:
            continue
        segment = costs.segment + (shared.merge if is_member else 0)
        own_cost += heads * (segment + max(1, -(-own // layer.tile)))
        own_spans += heads
        own_tokens += heads * max(0, own)
        merged += heads if is_member else 0
        longest_gap = max(longest_gap, 1 + segment)
    total += own_cost
    weighed = BalancedCosts(costs.segment, max(costs.minimum, longest_gap), costs.part, costs.pair)
    ranges, _ = _ranges(total, spans + own_spans, layer.slots, weighed, False)
    width = total / ranges  # cost of a range
    busy = (read_tokens + own_tokens) * layer.token_bytes / layer.bandwidth
    busy += (read_ends + own_spans * layer.segment_us) / ranges
    for group in range(groups):
        if members[group] > 0:
            filled = min(1.0, costs_of[group] / width)
            tokens = filled * width * EIGHTHS / eighths_of[group] * layer.tile
            ends = max(1.0, filled * width / span_cost_of[group])
            busy = max(busy, tokens * layer.token_bytes / layer.reading + ends * columns_of[group] * layer.read_us)
    merging = 0.0
    if own_spans > 0:
        share = min(1.0, width / own_cost)  # of the rows' spans that a range of them has
        own_us = own_tokens * layer.token_bytes / layer.alone + own_spans * layer.segment_us
        busy = max(busy, share * own_us)
        merging = max(1.0, share * merged) * layer.row_us if merged > 0 else 0.0
    return layer.start_us + busy + merging
