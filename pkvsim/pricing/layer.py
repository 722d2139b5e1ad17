"""The closed form of a step's kernel time on every route, compiled: no schedule is built and nothing simulated.

A step's tasks share the memory bandwidth: each running CTA gets the lesser of what one CTA can read and its share.
Tasks that all fit the CTA slots start together and advance alike, so their time follows from the sorted lengths;
more tasks than slots run in waves. pkvsim.timeline.timeline simulates what is summed up here.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import drop_stale, inner
from pkvsim.pricing.constants import (
    BALANCED,
    BANDWIDTH,
    BUCKETS,
    CHUNK,
    EVEN,
    FIXED,
    LAUNCH,
    MIN_SPLIT,
    PAIR,
    PARTIAL_ELEMENT_BYTES,
    PLAN,
    QUERY_ELEMENT_BYTES,
    QUEUE,
    STRIDED,
    TILE,
    WHOLE,
    compiled,
    cta_slots,
    merge_us,
    query_us,
    read_speeds,
    sm_gb_s,
)  # fmt: skip
from pkvsim.pricing.rows import bucket_splits, chunk_count, chunk_tokens, sort_descending, sorted_lengths, total_tokens
from pkvsim.pricing.rules import balanced_us, best_queue, buckets_us
from pkvsim.pricing.step_times import step_time, step_times
from pkvsim.pricing.tasks import chunks_us, even_us, strided_us
from pkvsim.schedule.costs import MEASURED_COSTS, BalancedCosts, paired
from pkvsim.schedule.make import skipped_tiles

__all__ = [
    "PARTIAL_ELEMENT_BYTES", "PLAN", "price_pinned", "price_route", "price_routes", "price_steps", "price_variant",
    "row_splits", "sorted_lengths", "step_time", "step_times",
]  # fmt: skip

_skipped_tiles = inner(skipped_tiles)
_paired = inner(paired)
PAGE_SIZE = 16  # tokens; steps are priced as if their pages had no fewer


@compiled
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

    That is of a layer that follows another; step_times makes a step of it. row_splits turns splits[r] into the splits
    of every row.
    """
    splits[:] = 0
    price_pinned(
        seq_lens, num_kv_heads, group_size, head_dim, kv_element_bytes, num_sms, constants, prices_us, splits
    )


@compiled
def price_pinned(
    seq_lens: np.ndarray, num_kv_heads: int, group_size: int, head_dim: int, kv_element_bytes: int, num_sms: int,
    constants: np.ndarray, prices_us: np.ndarray, splits: np.ndarray,
) -> None:  # fmt: skip
    """price_routes where splits also come in: of every row, 0 to choose them. Routes that cut themselves ignore it."""
    reaches = np.zeros(len(constants), np.int64)
    price_variant(
        seq_lens, num_kv_heads, group_size, head_dim, head_dim, float(kv_element_bytes), num_sms, reaches, constants,
        prices_us, splits,
    )  # fmt: skip


@compiled
def price_variant(
    seq_lens: np.ndarray,  # [batch_size] int32 or int64, zeros allowed
    num_kv_heads: int,
    group_size: int,  # query heads of a KV head, times the query tokens of a row
    head_dim: int,  # of K
    v_head_dim: int,
    kv_element_bytes: float,  # of K and V, the bytes of their scales shared out
    num_sms: int,
    reaches: np.ndarray,  # [num_routes] int64, tokens at a row's end that are read (AttentionOptions.reach), 0: all
    constants: np.ndarray,  # [num_routes, NUM_CONSTANTS] float64
    prices_us: np.ndarray,  # [num_routes] float64, out
    splits: np.ndarray,  # [num_routes] int64, in and out
) -> None:
    """price_pinned for any attention options: a route reads the tiles that its reach touches."""
    ordered = sorted_lengths(seq_lens)
    for route in range(len(constants)):
        if math.isnan(constants[route, BANDWIDTH]):
            prices_us[route] = math.inf
            splits[route] = 0
        else:
            reads = ordered
            if reaches[route] > 0:
                reads = _reads(ordered, reaches[route], constants[route])
            prices_us[route], splits[route] = _price(
                ordered, reads, num_kv_heads, group_size, head_dim, v_head_dim, kv_element_bytes, num_sms,
                constants[route], splits[route],
            )  # fmt: skip


@inner
def _reads(ordered: np.ndarray, reach: int, c: np.ndarray) -> np.ndarray:
    """Tokens that rows of these lengths read, whole tiles but for the row's end; longest first, but in the order of the
    rows for the paper's split, whose launches go by the rows' lengths."""
    reads = np.empty_like(ordered)
    tile = int(c[TILE])
    for row in range(len(ordered)):
        reads[row] = ordered[row] - _skipped_tiles(ordered[row], reach, tile) * tile
    if c[0] != BUCKETS:
        sort_descending(reads, len(reads))
    return reads


@compiled
def row_splits(
    seq_lens: np.ndarray,  # [batch_size] int32 or int64
    reads: np.ndarray,  # [batch_size] int32 or int64, tokens that each row reads; seq_lens without a window
    num_kv_heads: int,
    num_sms: int,
    c: np.ndarray,  # [NUM_CONSTANTS] float64, of split or workqueue
    longest_splits: int,  # as price_routes gives it
    out: np.ndarray,  # [batch_size] int64, out
) -> None:
    """The splits of every row: by each length's own rows in the paper's split, as many in all rows where the rule is
    so, otherwise (workqueue, FlashInfer) in proportion to length. A row of no tokens has 1, which costs nothing."""
    slots = cta_slots(c, num_sms)
    longest = 1
    for length in reads:
        longest = max(longest, length)
    for row in range(len(seq_lens)):
        length = np.int64(reads[row])
        if c[0] == EVEN or c[0] == WHOLE:
            out[row] = longest_splits
        elif c[0] != BUCKETS:
            out[row] = max(1, (length * longest_splits + longest - 1) // longest)
        else:
            alike = 0
            for other in seq_lens:
                alike += other == seq_lens[row]
            out[row] = bucket_splits(alike * num_kv_heads, length, slots, c)


@compiled
def price_steps(
    lengths: np.ndarray, offsets: np.ndarray, owners: np.ndarray, shapes: np.ndarray, element_bytes: int, num_sms: int,
    constants: np.ndarray, prices_us: np.ndarray,
) -> None:  # fmt: skip
    """The mean price of every measurement's steps, into prices_us [num_measurements].

    lengths holds all steps' rows, each step's longest first, step i at [offsets[i], offsets[i + 1]); owners [num_steps]
    is the measurement of each; shapes [num_measurements, 5]: num_kv_heads, group_size, head_dim, pinned splits or 0,
    and 1 where events around whole steps saw the host's planning too.
    """
    steps = np.zeros(len(prices_us))
    prices_us[:] = 0.0
    for step in range(len(owners)):
        owner = owners[step]
        heads, group, head_dim, pinned, planned = shapes[owner]
        rows = lengths[offsets[step] : offsets[step + 1]]
        us, _ = price_route(rows, heads, group, head_dim, element_bytes, num_sms, constants, pinned)
        prices_us[owner] += us + planned * constants[PLAN]
        steps[owner] += 1
    prices_us /= steps


@compiled
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
    return _price(
        ordered, ordered, num_kv_heads, group_size, head_dim, head_dim, float(kv_element_bytes), num_sms, c, pinned
    )


@inner
def _price(
    lengths: np.ndarray, ordered: np.ndarray, num_kv_heads: int, group_size: int, head_dim: int, v_head_dim: int,
    kv_element_bytes: float, num_sms: int, c: np.ndarray, pinned: int,
) -> tuple[float, int]:  # fmt: skip
    """price_route of rows of these lengths [rows] that read the tokens of `ordered` [rows], as _reads gives them."""
    rows = len(ordered)
    if rows == 0:
        return c[FIXED], 1
    tokens = total_tokens(ordered)
    token_bytes = (head_dim + v_head_dim) * kv_element_bytes
    kv_bytes = tokens * num_kv_heads * token_bytes
    alone, shared = read_speeds(c, kv_bytes, group_size, kv_element_bytes, num_sms)
    one = token_bytes / alone  # us a token, one CTA alone
    all_ = token_bytes / shared  # us a token and running CTA, bandwidth shared
    state = group_size * (2 + v_head_dim) * float(PARTIAL_ELEMENT_BYTES)  # bytes of a task's partial state
    slots = cta_slots(c, num_sms)
    heads = rows * num_kv_heads
    memory = c[BANDWIDTH] * 1e3  # bytes per us, whatever the arithmetic
    sm = token_bytes / (sm_gb_s(c, group_size, kv_element_bytes) * 1e3)  # us a token, by the arithmetic of one SM
    us = c[FIXED] + query_us(c, heads * group_size, 0.5 * (head_dim + v_head_dim), QUERY_ELEMENT_BYTES)
    rule = int(c[0])
    if rule == BALANCED:
        pair = _paired(int(c[PAIR]), group_size, v_head_dim, kv_element_bytes, PAGE_SIZE)
        costs = BalancedCosts(MEASURED_COSTS.segment, MEASURED_COSTS.minimum, MEASURED_COSTS.part, pair)
        busy, splits = balanced_us(ordered, tokens, num_kv_heads, slots, c, one, all_, state, memory, costs)
        return us + busy, splits
    if rule == BUCKETS:
        busy, splits = buckets_us(
            lengths, ordered, num_kv_heads, slots, c, one, all_, sm, state, memory, num_sms, pinned
        )
        return us + busy, splits
    if rule == QUEUE and pinned == 0:
        busy, splits = best_queue(ordered, tokens, num_kv_heads, slots, c, one, all_, sm, state, memory, num_sms)
        return us + busy, splits
    splits = 1
    if rule == CHUNK:
        chunk = chunk_tokens(ordered, slots // num_kv_heads, int(c[TILE]), c[MIN_SPLIT])
        splits = -(-ordered[0] // chunk)
        if splits > 1:
            tasks = num_kv_heads * chunk_count(ordered, chunk)
            us += chunks_us(ordered, num_kv_heads, slots, chunk, tasks, num_sms, c, one, all_, sm)
            return us + merge_us(c, float(splits), float(tasks), state, memory), splits
    elif rule == EVEN or rule == QUEUE:
        most = max(1, int(ordered[0] / c[MIN_SPLIT]))
        splits = min(most, max(1, slots // heads)) if rule == EVEN else pinned
    if rule == QUEUE and c[STRIDED]:
        us += strided_us(ordered, num_kv_heads, splits, False, slots, c, one, all_)
    else:
        us += even_us(ordered, num_kv_heads, slots, splits, int(c[TILE]), num_sms, c, one, all_, sm)
    if rule == QUEUE:
        us += c[LAUNCH]
    if splits > 1:
        us += merge_us(c, float(splits), float(heads * splits), state, memory)
    return us, splits


drop_stale("pkvsim")
