"""What a decode layer costs where several GPUs hold the rows' KV together: the slowest rank's attention, and the states
that ranks send each other.

A rank sends a state (m, l and the output's elements, FP32) for each row and query head that another owns, once:

    bytes = rows * query heads * (v_head_dim + 2) * 4 * (ranks - 1) / ranks    owned by the head or by the row
    bytes = rows * query heads * (v_head_dim + 2) * 4 * (ranks - 1)            owned by all

States go out as they are ready, while CTAs still read. What a layer ends with is the way of the last ones, one (row,
KV head) of each CTA at most, paid once a layer and not once a row:

    exchange_us = link_us + bytes * min(1, SMs / (rows * KV heads)) / link_gb_s + MERGE_US
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.outside.communication import DEFAULT_LINK_GB_S
from pkvsim.schedule.shares import MAX_RANKS, PageShares
from pkvsim.shapes import DecodeShape, check_int

DEFAULT_LINK_US = 1.5  # of a GPU whose file does not say: peers over PCIe, an assumption
MERGE_US = 1.0  # a rank's own states through L2, their sum and its output: an assumption
STATE_ELEMENT_BYTES = 4
OWNERS = ("head", "row", "all")


@dataclass(frozen=True, slots=True)
class Link:
    """How GPUs of a host reach each other."""

    gb_s: float  # out of a GPU, one direction
    us: float  # until a store is seen at the other end

    @classmethod
    def of(cls, device: DeviceSpec) -> Link:
        return cls(float(device.link_gb_s or DEFAULT_LINK_GB_S),
                   DEFAULT_LINK_US if device.link_us is None else float(device.link_us))


def exchange_bytes(shape: DecodeShape, rows: Any, ranks: int, *, owner: str = "head",
                   options: AttentionOptions = PLAIN) -> Any:
    """Bytes that a rank sends in one layer of a step of so many rows with tokens (number or array), float64.

    Raises ValueError naming the argument.
    """
    check_int("ranks", ranks, 1, MAX_RANKS)
    if owner not in OWNERS:
        raise ValueError(f"owner: expected one of {', '.join(OWNERS)}, got {owner!r}")
    whole = np.asarray(rows, np.float64) * shape.num_q_heads * options.query_tokens * (
        options.value_dim(shape) + 2) * STATE_ELEMENT_BYTES
    return whole * ((ranks - 1) if owner == "all" else (ranks - 1) / ranks)


def exchange_us(shape: DecodeShape, rows: Any, device: DeviceSpec, ranks: int, *, owner: str = "head",
                options: AttentionOptions = PLAIN) -> Any:
    """What sending and merging states adds to a layer, us; 0 on one GPU and without rows. Raises ValueError naming the
    argument."""
    link, size = Link.of(device), exchange_bytes(shape, rows, ranks, owner=owner, options=options)
    last = np.minimum(1.0, device.num_sms / np.maximum(1.0, np.asarray(rows, np.float64) * shape.num_kv_heads))
    return np.where(size > 0, link.us + size * last / (link.gb_s * 1e3) + MERGE_US, 0.0)[()]


def rank_lens(seq_lens: Any, shares: PageShares) -> np.ndarray:
    """Tokens that each rank has of each row, int32 [ranks, batch_size]."""
    return np.stack([shares.local_lens(seq_lens, rank) for rank in range(shares.num_ranks)])
