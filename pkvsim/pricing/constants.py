"""The columns of a row of constants (RouteModel.to_row), and the speeds and times that follow from them. Compiled."""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import compiled, inner
from pkvsim.devices.route_model import CONSTANTS, RULES
from pkvsim.schedule.costs import BalancedCosts

QUERY_ELEMENT_BYTES = 2  # queries and outputs are FP16 or BF16, whatever the cache is
PARTIAL_ELEMENT_BYTES = 4  # partial states are FP32: m, l and head_dim sums per query head
RULE = 0
(
    BANDWIDTH, CTA_READ, FIXED, LAUNCH, TASK, SEGMENT, MERGE, MERGE_SPLIT, MERGE_COLUMNS, MERGE_SPEED, ISOLATED,
    PLAN, PLAN_ROW, PLAN_LENGTH, HOST, RUN, L2_SPEED, L2_SIZE, SM_HEADS, BASE_HEADS, HEAD_PAD, CTAS_PER_SM, TILE,
    MIN_SPLIT, STRIDED,
) = range(1, 1 + len(CONSTANTS))  # fmt: skip
COSTS = 1 + len(CONSTANTS)  # the first of BalancedCosts' fields
WHOLE, CHUNK, EVEN, BUCKETS, QUEUE, BALANCED = range(len(RULES))


@compiled
def cta_slots(constants: np.ndarray, num_sms: int) -> int:
    """CTAs that run at a time."""
    return max(1, int(num_sms * constants[CTAS_PER_SM]))


@inner
def balanced_costs(constants: np.ndarray) -> BalancedCosts:
    """What the route's balanced schedule weighs, on a kernel that pairs its SMs in full."""
    return BalancedCosts(
        int(constants[COSTS]), int(constants[COSTS + 1]), int(constants[COSTS + 2]), int(constants[COSTS + 3])
    )


@compiled
def read_speeds(
    constants: np.ndarray, kv_bytes: float, columns: int, kv_element_bytes: float, num_sms: int
) -> tuple[float, float]:
    """Bytes per us of KV: what one CTA reads alone, and all together: memory or, for what it holds, L2; or
    arithmetic."""
    memory = constants[BANDWIDTH]
    if constants[L2_SIZE] > 0:
        hit = min(1.0, max(0.0, 2.0 - kv_bytes / (constants[L2_SIZE] * 1e6)))
        memory = 1.0 / (hit / max(memory, constants[L2_SPEED]) + (1.0 - hit) / memory)
    arithmetic = sm_gb_s(constants, columns, kv_element_bytes)
    shared = min(memory, num_sms * arithmetic)
    return 1e3 * min(constants[CTA_READ], arithmetic, shared), 1e3 * shared


@inner
def sm_gb_s(constants: np.ndarray, columns: int, kv_element_bytes: float) -> float:
    """GB/s of KV that the arithmetic of one SM keeps up with."""
    heads = constants[BASE_HEADS] + math.ceil(columns / constants[HEAD_PAD]) * constants[HEAD_PAD]
    return constants[SM_HEADS] / heads * kv_element_bytes / 2


@compiled
def query_us(constants: np.ndarray, query_heads: int, head_dim: float, element_bytes: int) -> float:
    """Reading q and writing out of so many query heads over all rows; head_dim: the mean of q's and out's."""
    return query_heads * head_dim * element_bytes * 2.0 / (constants[BANDWIDTH] * 1e3)


@compiled
def merge_us(constants: np.ndarray, columns: int, state_bytes: float, splits: float, tasks: float) -> float:
    """Merging `tasks` partial states of one KV head's `columns` each, state_bytes of them a task, at most `splits` of
    them of one row and head."""
    turns = max(1.0, math.ceil(columns / constants[MERGE_COLUMNS]))
    one_split = turns * constants[MERGE_SPLIT] + state_bytes / (constants[MERGE_SPEED] * 1e3)
    return constants[MERGE] + splits * one_split + 2 * tasks * state_bytes / (constants[BANDWIDTH] * 1e3)
