"""The paper's policy on one step, compiled: PaperPolicy.decide for loops that decide a million times."""
from __future__ import annotations

from typing import NamedTuple

import numba

from pkvsim.pricing_tasks import PARTIAL_ELEMENT_BYTES, inner

FLASHINFER, SPLIT, WORKQUEUE = range(3)


class PaperRules(NamedTuple):
    """The numbers that the paper's policy needs of itself and of a GPU."""

    group_size: int  # the only one that its engine serves
    min_context: int  # tokens; a step whose longest row is shorter goes to FlashInfer
    min_workqueue_rows: int
    tile_tokens: int
    target_ctas: int
    min_splits: int
    max_splits: int
    workqueue_cap: int  # of splits, at 8 rows and more
    beta_bytes_per_us: float  # with the paper's MiB over GB/s
    launch_us: float
    min_ctas_per_sm: float


@numba.njit(cache=True)
def paper_choice(ordered, num_kv_heads, group_size, head_dim, kv_element_bytes, num_sms, rules):
    """(FLASHINFER, SPLIT or WORKQUEUE; splits of the longest row) for ordered [rows] int64 > 0, longest first."""
    rows = len(ordered)
    if group_size != rules.group_size or rows == 0 or ordered[0] < rules.min_context:
        return FLASHINFER, 1
    if 1 < rows < rules.min_workqueue_rows:
        return FLASHINFER, 1
    tokens = 0
    for length in ordered:
        tokens += length
    kv_us = 2.0 * tokens * num_kv_heads * head_dim * kv_element_bytes / rules.beta_bytes_per_us
    ctas = rows * num_kv_heads
    flashinfer_us = kv_us * max(1.0, rules.min_ctas_per_sm * num_sms / ctas) + rules.launch_us
    row_target = _up4((rules.target_ctas + ctas - 1) // ctas)
    longest = -(-ordered[0] // rules.tile_tokens)
    if rows == 1:
        splits = max(row_target, _up4(-(-longest // 96)))
        splits = max(rules.min_splits, min(splits, rules.max_splits, longest))
    else:
        splits = max(row_target, _up4(-(-longest // 64)))
        splits = max(rules.min_splits, min(splits, rules.workqueue_cap, rules.max_splits, longest))
    splits = min(splits, longest)
    state_bytes = group_size * (2 + head_dim) * PARTIAL_ELEMENT_BYTES
    us = kv_us * max(1.0, rules.min_ctas_per_sm * num_sms / (ctas * splits)) + 2 * rules.launch_us
    us += ctas * splits * state_bytes / rules.beta_bytes_per_us
    if us < flashinfer_us:
        return (SPLIT if rows == 1 else WORKQUEUE), splits
    return FLASHINFER, 1


@inner
def _up4(count):
    return -(-count // 4) * 4
