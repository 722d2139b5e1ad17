"""The closed form of a step's kernel time on every route, compiled: no schedule is built and nothing simulated.

A step's tasks share the memory bandwidth: each running CTA gets the lesser of what one CTA can read and its share.
Tasks that all fit the CTA slots start together and advance alike, so their time follows from the sorted lengths;
more tasks than slots run in waves. pkvsim.timeline.timeline simulates what is summed up here.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pkvsim.compiled import allocating, compiled, drop_stale, inner_allocating, merged
from pkvsim.pricing.constants import (
    BALANCED,
    BANDWIDTH,
    BUCKETS,
    CHUNK,
    FIXED,
    LAUNCH,
    PLAN,
    QUERY_ELEMENT_BYTES,
    QUEUE,
    query_us,
)
from pkvsim.pricing.cuts import tokens_read, total_tokens
from pkvsim.pricing.layer import Heads, make_layer
from pkvsim.pricing.rules import by_buckets, by_queue, by_ranges, evenly, in_chunks


class Candidates(NamedTuple):
    """Routes to price, in the order of ROUTES."""

    constants: np.ndarray  # [num_routes, NUM_CONSTANTS] float64, as constants_matrix gives them; NaN: none of these
    reaches: np.ndarray  # [num_routes] int64, tokens at a row's end that are read (AttentionOptions.reach), 0: all
    pinned: np.ndarray  # [num_routes] int64, splits of every row, 0: the route's own rule; others ignore it


@compiled
def price_route(
    lengths: np.ndarray,  # [rows] int64 > 0, longest first
    reads: np.ndarray,  # [rows] int64, the tokens read of them as tokens_read gives them; lengths without a window
    heads: Heads,
    constants: np.ndarray,  # [NUM_CONSTANTS] float64
    pinned: int,
) -> tuple[float, int]:
    """(kernel us of one layer, splits of the longest row). pinned: splits of every row, 0 to choose."""
    if len(reads) == 0:
        return constants[FIXED], 1
    tokens = total_tokens(reads)
    layer = make_layer(heads, constants, tokens)
    query_heads = len(reads) * heads.num_kv_heads * heads.columns
    us = constants[FIXED] + query_us(
        constants, query_heads, 0.5 * (heads.head_dim + heads.v_head_dim), QUERY_ELEMENT_BYTES
    )
    if layer.rule == BALANCED:
        busy, splits = by_ranges(reads, tokens, layer)
    elif layer.rule == BUCKETS:
        busy, splits = by_buckets(lengths, reads, pinned, layer)
    elif layer.rule == QUEUE and pinned == 0:
        busy, splits = by_queue(reads, tokens, layer)
    elif layer.rule == CHUNK:
        return in_chunks(reads, us, layer)
    else:
        return evenly(reads, pinned, us, layer)
    return us + busy, splits


@merged
def price_routes(
    ordered: np.ndarray,  # [rows] int64 > 0, longest first, as sorted_lengths gives them
    heads: Heads,
    candidates: Candidates,
    prices_us: np.ndarray,  # [num_routes] float64, out: kernel time of one layer
    splits: np.ndarray,  # [num_routes] int64, out: splits of the longest row
) -> None:
    """Prices one step on every route; a row of NaN costs infinity with 0 splits.

    That is of a layer that follows another; step_times makes a step of it. row_splits turns splits[r] into the splits
    of every row.
    """
    for route in range(len(candidates.constants)):
        prices_us[route], splits[route] = price_candidate(ordered, heads, candidates, route)


@merged
def price_candidate(ordered: np.ndarray, heads: Heads, candidates: Candidates, route: int) -> tuple[float, int]:
    """price_routes of one route."""
    constants, reach, pinned = candidates.constants[route], candidates.reaches[route], candidates.pinned[route]
    us, splits = math.inf, np.int64(0)
    if not math.isnan(constants[BANDWIDTH]):
        if reach > 0:
            us, splits = _price_window(ordered, reach, heads, constants, pinned)
        else:
            us, splits = price_route(ordered, ordered, heads, constants, pinned)
    return us, splits


@compiled
def least_bucket_us(distinct: int, tokens: int, heads: Heads, constants: np.ndarray) -> float:
    """No more than price_route of the paper's split for rows of `distinct` lengths and `tokens` tokens, all of which
    they read: its launches, and the tokens at the bandwidth."""
    layer = make_layer(heads, constants, tokens)
    return constants[FIXED] + (distinct - 1) * constants[LAUNCH] + tokens * heads.num_kv_heads * layer.shared_us


@inner_allocating
def _price_window(ordered, reach, heads, constants, pinned):
    """price_route of rows that read no more than their last `reach` tokens."""
    return price_route(ordered, tokens_read(ordered, reach, constants), heads, constants, pinned)


class MeasuredSteps(NamedTuple):
    """The steps of some measurements, one after the other."""

    lengths: np.ndarray  # int64 > 0, every step's rows, each step's longest first
    offsets: np.ndarray  # [num_steps + 1] int64, step i has rows [offsets[i], offsets[i + 1])
    owners: np.ndarray  # [num_steps] int64, the measurement that the step belongs to
    # [num_measurements, 6] int64: num_kv_heads, group_size, head_dim, page_size, pinned splits or 0, and 1 where events
    # around whole steps saw the host's planning too.
    shapes: np.ndarray


@allocating
def price_steps(
    steps: MeasuredSteps, kv_element_bytes: float, num_sms: int, constants: np.ndarray, prices_us: np.ndarray
) -> None:
    """The mean price of every measurement's steps on one route, into prices_us [num_measurements]."""
    counts = np.zeros(len(prices_us))
    prices_us[:] = 0.0
    for step in range(len(steps.owners)):
        owner = steps.owners[step]
        num_kv_heads, group_size, head_dim, page_size, pinned, planned = steps.shapes[owner]
        heads = Heads(num_kv_heads, group_size, head_dim, head_dim, kv_element_bytes, page_size, num_sms)
        rows = steps.lengths[steps.offsets[step] : steps.offsets[step + 1]]
        us, _ = price_route(rows, rows, heads, constants, pinned)
        prices_us[owner] += us + planned * constants[PLAN]
        counts[owner] += 1
    prices_us /= counts


drop_stale("pkvsim")
