"""What a route's constants give for speeds, merges and slots; the base of the closed form. Compiled.

`c` is a row of constants (RouteModel.to_row).
"""
from __future__ import annotations

import math

import numba
import numpy as np

from pkvsim.compiled import inner
from pkvsim.devices.route_model import CONSTANTS, RULES

QUERY_ELEMENT_BYTES = 2  # queries and outputs are FP16 or BF16, whatever the cache is
PARTIAL_ELEMENT_BYTES = 4  # partial states are FP32: m, l and head_dim sums per query head
(
    BANDWIDTH, CTA_READ, FIXED, LAUNCH, TASK, SEGMENT, MERGE, MERGE_SPLIT, MERGE_SPEED, ISOLATED, PLAN, PLAN_ROW,
    PLAN_LENGTH, HOST, RUN, L2_SPEED, L2_SIZE, SM_HEADS, BASE_HEADS, HEAD_PAD, CTAS_PER_SM, TILE, MIN_SPLIT, PAIR,
    STRIDED,
) = range(1, 1 + len(CONSTANTS))  # fmt: skip
WHOLE, CHUNK, EVEN, BUCKETS, QUEUE, BALANCED = range(len(RULES))
# As pkvsim.compiled.inner, and with a way in from Python.
compiled = numba.njit(cache=True, error_model="numpy", no_cfunc_wrapper=True)


@compiled
def cta_slots(c: np.ndarray, num_sms: int) -> int:
    """CTAs that run at a time."""
    return max(1, int(num_sms * c[CTAS_PER_SM]))


@compiled
def read_speeds(
    c: np.ndarray, kv_bytes: float, group_size: int, kv_element_bytes: float, num_sms: int
) -> tuple[float, float]:
    """Bytes per us of KV: what one CTA reads alone, and all together: memory or, for what it holds, L2; or
    arithmetic."""
    memory = c[BANDWIDTH]
    if c[L2_SIZE] > 0:
        hit = min(1.0, max(0.0, 2.0 - kv_bytes / (c[L2_SIZE] * 1e6)))
        memory = 1.0 / (hit / max(memory, c[L2_SPEED]) + (1.0 - hit) / memory)
    arithmetic = sm_gb_s(c, group_size, kv_element_bytes)
    shared = min(memory, num_sms * arithmetic)
    return 1e3 * min(c[CTA_READ], arithmetic, shared), 1e3 * shared


@inner
def sm_gb_s(c: np.ndarray, group_size: int, kv_element_bytes: float) -> float:
    """GB/s of KV that the arithmetic of one SM keeps up with."""
    heads = c[BASE_HEADS] + math.ceil(group_size / c[HEAD_PAD]) * c[HEAD_PAD]
    return c[SM_HEADS] / heads * kv_element_bytes / 2


@compiled
def query_us(c: np.ndarray, query_heads: int, head_dim: float, element_bytes: int) -> float:
    """Reading q and writing out of so many query heads over all rows; head_dim: the mean of q's and out's."""
    return query_heads * head_dim * element_bytes * 2.0 / (c[BANDWIDTH] * 1e3)


@compiled
def merge_us(c: np.ndarray, splits: float, tasks: float, state_bytes: float, memory: float) -> float:
    """Merging `tasks` partial states of one KV head's group each, at most `splits` of them of one row and head."""
    one_split = c[MERGE_SPLIT] + state_bytes / (c[MERGE_SPEED] * 1e3)
    return c[MERGE] + splits * one_split + 2 * tasks * state_bytes / memory
