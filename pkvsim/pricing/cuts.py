"""How rows are cut: sorted lengths, and the splits or chunks that each rule makes of them. Compiled.

Lengths come sorted, longest first, without zeros, in tokens that are read.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import allocating, compiled, inner
from pkvsim.pricing.constants import BUCKETS, EVEN, MIN_SPLIT, RULE, TILE, WHOLE, cta_slots
from pkvsim.schedule.make import skipped_tiles

_skipped_tiles = inner(skipped_tiles)


@allocating
def sorted_lengths(seq_lens: np.ndarray) -> np.ndarray:
    """The lengths above 0, longest first, int64."""
    ordered = np.empty(len(seq_lens), np.int64)
    used = 0
    for length in seq_lens:
        if length > 0:
            ordered[used] = length
            used += 1
    sort_descending(ordered, used)
    return ordered[:used]


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
def total_tokens(lengths: np.ndarray) -> int:
    """The sum. A function of its own, because Numba compiles callers' callees twice for a sum that begins as 0."""
    tokens = 0
    for length in lengths:
        tokens += length
    return tokens


@allocating
def tokens_read(ordered: np.ndarray, reach: int, constants: np.ndarray) -> np.ndarray:
    """Tokens that rows of these lengths read, whole tiles but for the row's end; longest first, but in the order of the
    rows for the paper's split, whose launches go by the rows' lengths."""
    reads = np.empty_like(ordered)
    tile = int(constants[TILE])
    for row in range(len(ordered)):
        reads[row] = ordered[row] - _skipped_tiles(ordered[row], reach, tile) * tile
    if int(constants[RULE]) != BUCKETS:
        sort_descending(reads, len(reads))
    return reads


@inner
def bucket_splits(heads: int, length: int, slots: int, least: float) -> int:
    """Splits, none shorter than `least` tokens, of rows of one length whose (row, KV head) pairs number `heads`: what
    fills the CTA slots."""
    return max(1, min(slots // heads, int(length / least)))


@inner
def splits_of_row(length: int, longest: int, splits: int, proportional: bool, tile: int) -> int:
    """Splits of a row where the longest has `splits`, in proportion to length or as many, at most its tiles."""
    if proportional:
        splits = (length * splits + longest - 1) // longest
    return min(splits, (length + tile - 1) // tile)


@inner
def proportional_count(ordered: np.ndarray, splits: int) -> int:
    """Tasks of one KV head with row i in ceil(length_i * splits / longest) splits."""
    longest = ordered[0]
    count = 0
    for length in ordered:
        count += (length * splits + longest - 1) // longest
    return count


@inner
def chunk_count(ordered: np.ndarray, chunk: int) -> int:
    """Tasks of one KV head with every row in chunks of so many tokens."""
    count = 0
    for length in ordered:
        count += (length + chunk - 1) // chunk
    return count


@compiled
def chunk_tokens(ordered: np.ndarray, most_chunks: int, tile: int, least: float) -> int:
    """The least chunk, in whole tiles, of which the rows give at most so many; the longest row if none does."""
    longest = -(-ordered[0] // tile)
    if len(ordered) >= most_chunks:
        return longest * tile
    low = max(1, int(math.ceil(least / tile)))
    high = max(low, longest)
    # Fewer tokens than an equal share are too few, and a row has less than one chunk more than its whole ones: the
    # chunk lies between the two, where most steps leave little to search.
    tokens = total_tokens(ordered)
    low = max(low, min(high, -(-tokens // (most_chunks * tile))))
    high = max(low, min(high, -(-tokens // ((most_chunks - len(ordered)) * tile))))
    while low < high:
        middle = (low + high) // 2
        if chunk_count(ordered, middle * tile) > most_chunks:
            low = middle + 1
        else:
            high = middle
    return low * tile


@compiled
def row_splits(
    seq_lens: np.ndarray,  # [batch_size] int32 or int64
    reads: np.ndarray,  # [batch_size] int32 or int64, tokens that each row reads; seq_lens without a window
    num_kv_heads: int,
    num_sms: int,
    constants: np.ndarray,  # [NUM_CONSTANTS] float64, of split or workqueue
    longest_splits: int,  # as price_routes gives it
    out: np.ndarray,  # [batch_size] int64, out
) -> None:
    """The splits of every row: by each length's own rows in the paper's split, as many in all rows where the rule is
    so, otherwise (workqueue, FlashInfer) in proportion to length. A row of no tokens has 1, which costs nothing."""
    rule, slots = int(constants[RULE]), cta_slots(constants, num_sms)
    longest = 1
    for length in reads:
        longest = max(longest, length)
    for row in range(len(seq_lens)):
        length = np.int64(reads[row])
        if rule == EVEN or rule == WHOLE:
            out[row] = longest_splits
        elif rule != BUCKETS:
            out[row] = max(1, (length * longest_splits + longest - 1) // longest)
        else:
            alike = 0
            for other in seq_lens:
                alike += other == seq_lens[row]
            out[row] = bucket_splits(alike * num_kv_heads, length, slots, constants[MIN_SPLIT])
