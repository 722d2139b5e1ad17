"""Bytes, counters and prices of a step: the paper's formula here, our model through pkvsim.pricing.layer.

Our model in Numba code: `price_routes(seq_lens, num_kv_heads, group_size, head_dim, kv_element_bytes, num_sms,
constants, prices_us, splits)` with `constants = constants_matrix(device.routes)` (float64 [len(ROUTES), NUM_CONSTANTS],
rows in the order of ROUTES) fills the kernel time of one layer and the longest row's splits by route. Nothing is
allocated by the caller per step but the two outputs, which may be reused. `step_times` gives the GPU's and the host's
part of a step of L layers that Python issues; with the layers inside a CUDA graph a step takes L * prices_us[r] +
constants[r, PLAN] us, PLAN being the host's planning.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import NUM_CONSTANTS, OWN_ROUTES, ROUTES, RouteModel, constants_matrix
from pkvsim.options import KV_ELEMENT_BYTES, PLAIN, AttentionOptions
from pkvsim.policy.paper_rules import MIB, paper_time_us
from pkvsim.pricing.layer import PARTIAL_ELEMENT_BYTES, PLAN, price_route, price_routes, step_time
from pkvsim.pricing.step_times import step_times
from pkvsim.schedule.make import Schedule
from pkvsim.shapes import DecodeShape

__all__ = [
    "KV_ELEMENT_BYTES", "MIB", "NUM_CONSTANTS", "OWN_ROUTES", "PLAN", "ROUTES", "RouteModel", "StepCounters",
    "constants_matrix", "flashinfer_counters", "merge_bytes", "paper_price_us", "price_route", "price_routes",
    "schedule_counters", "step_time", "step_times", "useful_kv_bytes",
]  # fmt: skip


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


def paper_price_us(
    *, kv_bytes: int, merge_bytes: int, launches: int, ctas_per_sm: float, device: DeviceSpec
) -> float:
    """The paper's price of a step, as pkvsim.policy.paper_rules.paper_time_us; used by the paper's policy alone."""
    return paper_time_us(
        kv_bytes, merge_bytes, launches, ctas_per_sm, device.beta_gb_s, device.launch_us, device.min_ctas_per_sm
    )
