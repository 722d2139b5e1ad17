"""Two sums over a block's words, by which it is known again: those that a disk keeps beside it are compared with those
of what has come back, by whoever holds the block then, a GPU or this function.

A block is words of 64 bits, numbered from 1 on and taken in pairs (a, b), with zeros behind its end up to a whole pair.
With a' = a ^ ODD * (a's number), and b' alike, all modulo 2^64,

    sums = (sum of low(a') * high(a') + b,  sum of low(b') * high(b') + a)

where low and high are the halves of 32 bits: XXH3's accumulators without its rounds
(https://github.com/Cyan4973/xxHash/blob/v0.8.3/doc/xxhash_spec.md). No pair waits for another one, so any number of
threads may take any part each and add up in any order. A flipped bit changes one of the sums always, since every word
is added to one of them as it is; blocks of unrelated bytes agree with a chance of about 2^-100.
"""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import unlocked

SUMS = 2
PAIR_BYTES = 16
ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the numbers' multiples differ in all bits


@unlocked
def _sums(words: np.ndarray) -> tuple[int, int]:
    odd, low = np.uint64(ODD), np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    first = second = number = np.uint64(0)
    for at in range(0, len(words) - 1, 2):
        number += odd
        a = words[at] ^ number
        number += odd
        b = words[at + 1] ^ number
        first += (a & low) * (a >> half) + words[at + 1]
        second += (b & low) * (b >> half) + words[at]
    return first, second


def block_sums(blocks: np.ndarray) -> np.ndarray:
    """blocks [num_blocks, block_bytes] uint8 -> sums [num_blocks, SUMS] uint64, other threads running meanwhile."""
    num_blocks, block_bytes = blocks.shape
    missing = -block_bytes % PAIR_BYTES
    if missing or not blocks.flags.c_contiguous:
        padded = np.zeros((num_blocks, block_bytes + missing), np.uint8)
        padded[:, :block_bytes] = blocks
        blocks = padded
    found = np.empty((num_blocks, SUMS), np.uint64)
    for at, words in enumerate(blocks.view(np.uint64)):
        found[at] = _sums(words)
    return found
