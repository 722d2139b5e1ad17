"""Rows of a step as the closed form takes them: sorted, counted and cut into splits or chunks. Compiled.

Lengths come sorted, longest first, without zeros; `c` is a row of constants (RouteModel.to_row).
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner
from pkvsim.pricing.constants import MIN_SPLIT, compiled


@compiled
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
def splits_of_row(length: int, longest: int, splits: int, proportional: bool, tile: int) -> int:
    if proportional:
        splits = (length * splits + longest - 1) // longest
    return min(splits, (length + tile - 1) // tile)


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
def proportional_count(ordered: np.ndarray, splits: int) -> int:
    """Tasks of one KV head with row i in ceil(length_i * splits / longest) splits."""
    longest = ordered[0]
    count = 0
    for length in ordered:
        count += (length * splits + longest - 1) // longest
    return count
