"""Decode attention as FlashAttention 3 schedules it: how rows are split, and how long the waves of their tiles take.

The split rule is prepare_varlen_num_blocks of github.com/Dao-AILab/flash-attention (hopper/flash_prepare_scheduler.cu,
BSD-3-Clause, read 2026-11): every SM is to get 1.1 times its share of the key blocks, and a row is cut where it has
more. Rows times KV heads that just exceed the SMs therefore take nearly two waves: the steps in time that a real vLLM
shows.
"""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import outer

BLOCK_TOKENS = 128  # keys of a tile
MOST_SPLITS = 32  # of a row, in captured graphs
FILL = 1.1  # of an SM's share of the key blocks


@outer
def flash_decode_us(lens, num_kv_heads, head_token_bytes, num_sms, bandwidth_gb_s, cta_gb_s, heap):
    """Kernel time of one layer over rows of `lens` tokens [rows] int64, launch left out.

    head_token_bytes: K and V of one token of one KV head. Tiles go to SMs in order; those that run share
    bandwidth_gb_s evenly, and none reads faster than cta_gb_s. heap: scratch [num_sms] float64.
    """
    blocks = 0
    for length in lens:
        blocks += (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    if blocks == 0:
        return 0.0
    per_sm = max(1, int(np.ceil(blocks * FILL * num_kv_heads / num_sms)))
    # Service is counted in bytes that every running tile has had, so that shares need no clock.
    heap[:] = 0.0
    for length in lens:
        row_blocks = (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        splits = min((row_blocks + per_sm - 1) // per_sm, MOST_SPLITS)
        if splits == 0:
            continue
        share = length * head_token_bytes / splits
        for _ in range(num_kv_heads * splits):
            _replace_least(heap, heap[0] + share)
    us, served = 0.0, 0.0
    for at in range(num_sms):
        running, end = num_sms - at, heap[0]
        _replace_least(heap, np.inf)
        if end > served:
            rate = min(cta_gb_s, bandwidth_gb_s / running) * 1e3  # bytes per us
            us += (end - served) / rate
            served = end
    return us


@outer
def _replace_least(heap, value):
    """Replaces the least element of a binary heap."""
    at, size = 0, len(heap)
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value
