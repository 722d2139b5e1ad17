"""Bytes and counters of a step, whatever the time it takes."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.constants import PARTIAL_ELEMENT_BYTES
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.make import Schedule
from pkvsim.shapes import DecodeShape

MIB = 2**20


@dataclass(frozen=True, slots=True)
class StepCounters:
    """What a schedule does in one step, whatever the time it takes."""

    launches: int
    merge_launches: int
    cta_work_per_sm: float  # decode CTAs that have a task, per SM
    useful_kv_bytes: int
    merge_bytes: int
    nonempty_cta_fraction: float  # CTAs with a task over CTAs launched


def useful_kv_bytes(shape: DecodeShape, seq_lens: np.ndarray, options: AttentionOptions = PLAIN) -> int:
    """Bytes of K and V that a step must read once: tokens * Hkv * (d + V's d) * 2, or * 1 and those of the scales where
    the cache is 8-bit; with a window, of its tokens."""
    seen = seq_lens if options.reach is None else np.minimum(seq_lens, options.reach)
    tokens = int(np.sum(seen, dtype=np.int64))
    return int(tokens * shape.num_kv_heads * options.kv_token_bytes(shape))


def distinct_kv_bytes(
    shape: DecodeShape, seq_lens: np.ndarray, groups: PrefixGroups, options: AttentionOptions = PLAIN
) -> int:
    """useful_kv_bytes of a step whose rows share leading pages: those of a group, of which there is one copy, once."""
    tokens = groups.prefix_pages.astype(np.int64) * shape.page_size  # [num_groups]
    members = np.bincount(groups.group_of_row[groups.group_of_row >= 0], minlength=len(tokens))
    again = int((tokens * np.maximum(0, members - 1)).sum())
    return useful_kv_bytes(shape, seq_lens, options) - int(again * shape.num_kv_heads * options.kv_token_bytes(shape))


def merge_bytes(shape: DecodeShape, num_partial_tasks: int, options: AttentionOptions = PLAIN) -> int:
    """Bytes of partial states: per task (2 + V's d) FP32 numbers for each query head and token of its KV head.

    Equal to slots * Hq * query tokens * (2 + d) * 4 where every KV head of a row has the same splits.
    """
    columns = shape.group_size * options.query_tokens
    return num_partial_tasks * columns * (2 + options.value_dim(shape)) * PARTIAL_ELEMENT_BYTES


def schedule_counters(
    schedule: Schedule, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, options: AttentionOptions = PLAIN
) -> StepCounters:
    """Counters of a PersistentKV schedule of these seq_lens [batch_size]."""
    return StepCounters(
        launches=schedule.num_launches,
        merge_launches=schedule.merge_launches,
        cta_work_per_sm=schedule.num_ctas / device.num_sms,
        useful_kv_bytes=useful_kv_bytes(shape, seq_lens, options),
        merge_bytes=merge_bytes(shape, schedule.num_partial_tasks, options),
        nonempty_cta_fraction=schedule.num_ctas / schedule.grid_ctas if schedule.grid_ctas else 1.0,
    )


def flashinfer_counters(
    shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, options: AttentionOptions = PLAIN
) -> StepCounters:
    """FlashInfer as the paper models it: one launch, one CTA per (row, KV head), no merge traffic."""
    active = int(np.count_nonzero(seq_lens))
    return StepCounters(
        launches=1,
        merge_launches=0,
        cta_work_per_sm=active * shape.num_kv_heads / device.num_sms,
        useful_kv_bytes=useful_kv_bytes(shape, seq_lens, options),
        merge_bytes=0,
        nonempty_cta_fraction=1.0,
    )
