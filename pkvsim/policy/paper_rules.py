"""The paper's formulas (arXiv 2606.26666) in plain numbers: called as they are by PaperPolicy, compiled by serving
loops."""
from __future__ import annotations

from typing import NamedTuple

from numba.extending import register_jitable

from pkvsim.compiled import outer
from pkvsim.pricing.constants import PARTIAL_ELEMENT_BYTES
from pkvsim.pricing.counters import MIB

PAPER_TILE_TOKENS = 32
PAPER_GROUP_SIZE = 4  # the only group size the paper's engine serves
TARGET_CTAS = 256  # CTAs that the split counts aim for
MAX_SPLITS = 48
MIN_SPLITS = 4
MIN_WORKQUEUE_ROWS = 8
FLASHINFER, SPLIT, WORKQUEUE = range(3)


class PaperRules(NamedTuple):
    """The numbers that the paper's policy takes from its settings and the GPU."""

    min_context: int  # tokens; a step whose longest row is shorter goes to FlashInfer
    beta_gb_s: float
    launch_us: float
    min_ctas_per_sm: float


@register_jitable
def paper_time_us(kv_bytes, merge_bytes, launches, ctas_per_sm, beta_gb_s, launch_us, min_ctas_per_sm):
    """T = KV/beta * max(1, C_min/C) + L*lambda + Merge/beta.

    Its bytes are MiB and its beta GB/s, with the quotient read as milliseconds: kept as published. A step without KV
    costs its launches.
    """
    us_per_byte = 1e3 / (MIB * beta_gb_s)
    starved = max(1.0, min_ctas_per_sm / ctas_per_sm) if ctas_per_sm else 1.0
    return kv_bytes * us_per_byte * starved + launches * launch_us + merge_bytes * us_per_byte


@register_jitable
def up4(count):
    """The next multiple of 4."""
    return -(-count // 4) * 4


@register_jitable
def row_target(rows, num_kv_heads):
    """Splits per row that give TARGET_CTAS CTAs."""
    return -(-TARGET_CTAS // (num_kv_heads * max(rows, 1)))


@register_jitable
def split_splits(longest, shortest, rows, num_kv_heads):
    """Splits of every row of the split route; longest and shortest row in tiles."""
    wanted = up4(max(row_target(rows, num_kv_heads), -(-longest // 96)))
    return max(MIN_SPLITS, min(wanted, MAX_SPLITS, shortest))


@register_jitable
def workqueue_splits(tiles, rows, num_kv_heads):
    """Splits of a row of `tiles` tiles in the workqueue."""
    cap = MAX_SPLITS
    if rows >= MIN_WORKQUEUE_ROWS:
        cap = 24
    elif rows >= 4:
        cap = 32
    elif rows == 2:
        cap = 40
    wanted = max(up4(row_target(rows, num_kv_heads)), up4(-(-tiles // 64)))
    return max(MIN_SPLITS, min(wanted, cap, tiles))


@outer
def paper_choice(ordered, num_kv_heads, group_size, head_dim, kv_element_bytes, num_sms, rules):
    """(FLASHINFER, SPLIT or WORKQUEUE; splits of the longest row) for ordered [rows] int64 > 0, longest first.

    What PaperPolicy.decide decides, a thousand times as fast.
    """
    rows = len(ordered)
    if group_size != PAPER_GROUP_SIZE or rows == 0 or ordered[0] < rules.min_context:
        return FLASHINFER, 1
    if 1 < rows < MIN_WORKQUEUE_ROWS:
        return FLASHINFER, 1
    tokens = 0
    for length in ordered:
        tokens += length
    kv_bytes = 2 * tokens * num_kv_heads * head_dim * kv_element_bytes
    ctas_per_split = rows * num_kv_heads
    longest = -(-ordered[0] // PAPER_TILE_TOKENS)
    if rows == 1:
        splits = min(longest, split_splits(longest, longest, rows, num_kv_heads))
    else:
        splits = min(longest, workqueue_splits(longest, rows, num_kv_heads))
    merge_bytes = ctas_per_split * splits * group_size * (2 + head_dim) * PARTIAL_ELEMENT_BYTES
    gpu = (rules.beta_gb_s, rules.launch_us, rules.min_ctas_per_sm)
    own_us = paper_time_us(kv_bytes, merge_bytes, 2, ctas_per_split * splits / num_sms, *gpu)
    if own_us < paper_time_us(kv_bytes, 0, 1, ctas_per_split / num_sms, *gpu):
        return (SPLIT if rows == 1 else WORKQUEUE), splits
    return FLASHINFER, 1
