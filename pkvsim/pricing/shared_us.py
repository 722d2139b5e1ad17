"""The closed form of a balanced step whose rows read their common pages once, compiled: no schedule is built.

The schedule cuts its cost axis evenly (pkvsim.schedule.spans), but what a range of reads takes and what a range of rows
takes are not alike: the step ends with the slower kind, or with the bandwidth, and then with the merges of a range.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import allocating, compiled, drop_stale, inner
from pkvsim.pricing.constants import (
    FIXED,
    QUERY_ELEMENT_BYTES,
    SEGMENT,
    TILE,
    balanced_costs,
    cta_slots,
    query_us,
    read_speeds,
)
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.shared import REREAD_SPEEDUP, ReadPrices
from pkvsim.schedule.costs import EIGHTHS, BalancedCosts, SharedCosts, paired, segment_of
from pkvsim.schedule.make import balanced_ranges

_ranges = inner(balanced_ranges)
_paired = inner(paired)
_segment_of = inner(segment_of)
_tile_eighths = inner(SharedCosts.tile_eighths)
_segment_tiles = inner(SharedCosts.segment_tiles)
_least_own = inner(SharedCosts.least_own)


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
    state_us: float  # of each state of it
    alone: float  # bytes per us of one CTA with a row's own tokens
    reading: float  # bytes per us of one CTA in a read
    read_share: float  # as ReadPrices
    bandwidth: float  # bytes per us of all
    again_bytes: float  # as ReadPrices
    costs: BalancedCosts
    shared: SharedCosts


@inner
def _both_kinds(
    reads: float,  # ranges
    read_speed: float,  # bytes per us of one at most
    read_bytes: float,  # of each
    read_fixed_us: float,  # of each beside its bytes
    rows: float,
    row_speed: float,
    row_bytes: float,
    row_fixed_us: float,
    bandwidth: float,  # bytes per us of all
    read_share: float,  # of a range of reads, of what one of rows gets
) -> float:
    """When ranges of reads and of rows have ended that begin together: while both kinds read the slower one leaves the
    other what it does not take; then that has all of the bandwidth."""
    even = bandwidth / (reads * read_share + rows)
    read_now, row_now = min(read_speed, even * read_share), min(row_speed, even)
    read_now = min(read_speed, max(read_now, (bandwidth - rows * row_now) / reads))
    row_now = min(row_speed, max(row_now, (bandwidth - reads * read_now) / rows))
    read_us, row_us = read_fixed_us + read_bytes / read_now, row_fixed_us + row_bytes / row_now
    first = min(read_us, row_us)
    read_left = (read_us - first) * read_now / min(read_speed, bandwidth / reads)
    row_left = (row_us - first) * row_now / min(row_speed, bandwidth / rows)
    return first + max(read_left, row_left)


@allocating
def shared_us(
    lens: np.ndarray,  # [batch_size] int64
    group_of_row: np.ndarray,  # [batch_size] int64 as PrefixGroups.members, -1 where a row reads alone
    prefix_tokens: np.ndarray,  # [num_groups] int64
    layer: SharedLayer,
) -> float:
    """Kernel time of a layer. NaN where no two rows share."""
    groups, heads, shared, costs = len(prefix_tokens), layer.num_kv_heads, layer.shared, layer.costs
    most = shared.columns // layer.columns  # members of a read
    table = np.zeros((6, groups), np.int64)  # one allocation: six take as long as the rest of a small step
    members, costs_of, eighths_of = table[0], table[1], table[2]
    columns_of, span_cost_of, skipped_of = table[3], table[4], table[5]  # skipped: tokens that members need not read
    for group in group_of_row:
        if group >= 0:
            members[group] += 1
    total, spans, read_tokens, again_tokens, read_ends = 0, 0, 0, 0, 0.0
    for group in range(groups):
        tiles = prefix_tokens[group] // layer.tile
        if members[group] < 2 or tiles == 0:
            members[group] = 0
            continue
        skipped_of[group] = tiles * layer.tile
        reads = -(-members[group] // most)
        columns_of[group] = -(-members[group] // reads) * layer.columns
        eighths = _tile_eighths(shared, columns_of[group])
        segment = _segment_tiles(shared, columns_of[group], costs.segment)
        span_cost_of[group] = segment - (-tiles * eighths // EIGHTHS)
        costs_of[group] = reads * heads * span_cost_of[group]
        eighths_of[group] = eighths
        total += costs_of[group]
        spans += reads * heads
        read_tokens += reads * heads * tiles * layer.tile
        if heads * tiles * layer.tile * layer.token_bytes <= layer.again_bytes:
            again_tokens += (reads - 1) * heads * tiles * layer.tile
        read_ends += reads * heads * columns_of[group] * layer.read_us
    if spans == 0:
        return np.nan
    outputs = 0
    for group in range(groups):
        outputs += heads * members[group]
    least_own = _least_own(shared, total, outputs)
    own_cost, own_spans, own_tokens, merged = 0, 0, 0, 0
    for row in range(len(lens)):
        group = group_of_row[row]
        is_member = group >= 0 and members[group] > 0
        own = lens[row] - (skipped_of[group] if is_member else 0)
        if own <= 0 and not is_member:
            continue
        tiles = max(1, -(-own // layer.tile))
        own_cost += heads * (costs.segment + (max(tiles, least_own) if is_member else tiles))
        own_spans += heads
        own_tokens += heads * max(0, own)
        merged += heads if is_member else 0
    total += own_cost
    # As SharedCosts.longest_gap, of the largest read that there may be.
    fullest = most * layer.columns
    read_gap = _segment_tiles(shared, fullest, costs.segment) - (-_tile_eighths(shared, fullest) // EIGHTHS)
    least = max(costs.minimum, costs.segment + least_own, read_gap)
    weighed = BalancedCosts(costs.segment, least, costs.part, costs.pair)
    ranges, _ = _ranges(total, spans + own_spans, layer.slots, weighed, False)
    width = total / ranges  # cost of a range
    from_memory = read_tokens + own_tokens - again_tokens * (1.0 - 1.0 / REREAD_SPEEDUP)
    busy = from_memory * layer.token_bytes / layer.bandwidth
    busy += (read_ends + own_spans * layer.segment_us) / ranges
    for group in range(groups):
        if members[group] > 0:
            filled = min(1.0, costs_of[group] / width)
            tokens = filled * width * EIGHTHS / eighths_of[group] * layer.tile
            ends = max(1.0, filled * width / span_cost_of[group])
            busy = max(busy, tokens * layer.token_bytes / layer.reading + ends * columns_of[group] * layer.read_us)
    merging = 0.0
    if own_spans > 0:
        both = read_tokens + own_tokens
        reads_of, rows_of = max(1.0, (total - own_cost) / width), max(1.0, own_cost / width)  # ranges
        busy = max(busy, _both_kinds(
            reads_of, layer.reading, read_tokens * layer.token_bytes / reads_of, read_ends / reads_of,
            rows_of, layer.alone, own_tokens * layer.token_bytes / rows_of, own_spans * layer.segment_us / rows_of,
            layer.bandwidth * both / max(1.0, from_memory), layer.read_share,
        ))  # fmt: skip
        if merged > 0:  # of the states of its read's parts and of its own span's
            own_states = 1.0 + own_cost / own_spans / width
            states = own_states
            for group in range(groups):
                states += members[group] * heads / merged * (1.0 + span_cost_of[group] / width)
            # Outputs of the fullest range, which are merged one after the other: of one member's KV heads, which lie
            # beside each other, and then of others.
            for row in range(len(lens)):
                group = group_of_row[row]
                if group >= 0 and members[group] > 0:
                    own = max(least_own, -(-(lens[row] - skipped_of[group]) // layer.tile)) + costs.segment
                    there = min(float(heads), width / own)
                    others = (width - there * own) * own_spans / own_cost
                    of_row = own_states + 1.0 + span_cost_of[group] / width
                    mean = (there * of_row + others * states) / (there + others)
                    outputs_us = max(1.0, np.ceil(there + others)) * (layer.row_us + mean * layer.state_us)
                    merging = max(merging, outputs_us)
    return layer.start_us + busy + merging


class ReadTokens(NamedTuple):
    """Tokens of one KV head in a step with reads."""

    all: int  # that the step reads, what each read of a group reads again included
    reads: int  # of those, by reads
    apart: int  # that the members of the reads would read of the same pages were each to read for itself


@compiled
def read_tokens(
    tokens: int,  # of all rows
    members: np.ndarray,  # [num_groups] int64, rows that read together; less than 2: none do
    prefix_tokens: np.ndarray,  # [num_groups] int64
    most: int,  # members of a read
    tile: int,
) -> ReadTokens:
    """What a step reads."""
    reads, apart = np.int64(0), np.int64(0)
    for group in range(len(prefix_tokens)):
        if members[group] >= 2:
            whole = prefix_tokens[group] // tile * tile
            reads += -(-members[group] // most) * whole
            apart += members[group] * whole
    return ReadTokens(tokens - apart + reads, reads, apart)


@compiled
def shared_layer(
    rows: int,
    tokens: int,  # of each KV head that the step reads, as ReadTokens.all
    heads: Heads,
    constants: np.ndarray,  # [NUM_CONSTANTS] float64, of the balanced route
    reads: ReadPrices,
    shared: SharedCosts,
) -> SharedLayer:
    """One layer of a step that reads so much."""
    token_bytes = (heads.head_dim + heads.v_head_dim) * heads.kv_element_bytes
    kv_bytes = tokens * heads.num_kv_heads * token_bytes
    alone, bandwidth = read_speeds(constants, kv_bytes, heads.columns, heads.kv_element_bytes, heads.num_sms)
    queries = query_us(
        constants, rows * heads.num_kv_heads * heads.columns, 0.5 * (heads.head_dim + heads.v_head_dim),
        QUERY_ELEMENT_BYTES,
    )  # fmt: skip
    costs = balanced_costs(constants)
    pair = _paired(costs.pair, heads.columns, heads.v_head_dim, heads.kv_element_bytes, heads.page_size)
    return SharedLayer(
        heads.num_kv_heads,
        heads.columns,
        cta_slots(constants, heads.num_sms),
        int(constants[TILE]),
        token_bytes,
        constants[FIXED] + reads.start_us + queries,
        constants[SEGMENT],
        reads.read_us,
        reads.row_us,
        reads.state_us,
        alone,
        min(alone, reads.read_gb_s * 1e3),
        reads.read_share,
        bandwidth,
        reads.again_bytes,
        BalancedCosts(_segment_of(costs.segment, heads.columns), costs.minimum, costs.part, pair),
        shared,
    )


drop_stale("pkvsim")
