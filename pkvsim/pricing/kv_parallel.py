"""What a decode layer costs where several GPUs hold the rows' KV together: the slowest rank's attention, and the states
that ranks send each other.

A rank sends a state (m, l and the output's elements, FP32) for each row and query head that another owns, once:

    bytes = rows * query heads * (v_head_dim + 2) * 4 * (ranks - 1) / ranks    owned by the head or by the row
    bytes = rows * query heads * (v_head_dim + 2) * 4 * (ranks - 1)            owned by all

States go out as they are ready, while CTAs still read. What a layer ends with is the way of the last ones, one (row,
KV head) of each CTA at most, paid once a layer and not once a row:

    exchange_us = link_us + bytes * min(1, SMs / (rows * KV heads)) / link_gb_s + MERGE_US

A simulated server deals pages to its GPUs one after the other in turn, so that the first has the most of each row and
is the slowest. Each GPU has all weights and does the rest of the step: a server has kv_parallel times the pages and,
decode attention aside, the speed of one GPU.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.compiled import inner
from pkvsim.devices.device import DeviceSpec
from pkvsim.models.decode_groups import DecodeGroup
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.outside.communication import DEFAULT_LINK_GB_S
from pkvsim.schedule.shares import MAX_RANKS, PageShares
from pkvsim.shapes import DecodeShape, check_int

DEFAULT_LINK_US = 1.5  # of a GPU whose file does not say: peers over PCIe, an assumption
MERGE_US = 1.0  # a rank's own states through L2, their sum and its output: an assumption
STATE_ELEMENT_BYTES = 4
OWNERS = ("head", "row", "all")
POLICY = "balanced"  # whose kernel merges over GPUs


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


@inner
def first_ranks(lens, page_size, ranks, found):
    """The tokens that the first of so many ranks has of rows of these lengths, in `found`, which may be `lens`."""
    cycle = page_size * ranks
    for row in range(len(lens)):
        found[row] = lens[row] // cycle * page_size + min(lens[row] % cycle, page_size)
    return found


def unserved_layers(groups: Sequence[DecodeGroup]) -> str | None:
    """A model's layers that no kernel serves over several GPUs, in words, or None where all are served. groups:
    its grouped-query attention."""
    if not groups:
        return "a model without grouped-query attention"
    for group in groups:
        if group.options is not None and group.options.window is not None:
            return (f"layers with windows, which no kernel serves over several GPUs, got layers of "
                    f"{group.options.window} tokens")
    return None


def check_kv_parallel(policy: str, groups: Sequence[DecodeGroup]) -> None:
    """ValueError where no kernel serves the policy, several query tokens of a row, or one of the model's kinds of
    layers, over several GPUs."""
    if policy != POLICY:
        raise ValueError(f"policies: expected {POLICY} alone with kv_parallel, got {policy}")
    for group in groups:
        if group.options is not None and group.options.query_tokens != 1:
            raise ValueError(f"query_tokens: expected 1 with kv_parallel, as its kernel serves no other, got "
                             f"{group.options.query_tokens}")
    unserved = unserved_layers(groups)
    if unserved is not None:
        raise ValueError(f"kv_parallel: expected 1 for {unserved}")


def exchange_table(groups: Sequence[DecodeGroup], device: DeviceSpec, *, ranks: int, max_batch: int) -> np.ndarray:
    """us that a step of so many rows spends on exchanges over all layers, float64 [max_batch + 1]; [1] of one GPU."""
    table = np.zeros(max_batch + 1 if ranks > 1 else 1)
    for group in groups if ranks > 1 else ():
        if group.shape is not None and group.options is not None:
            table += group.count * exchange_us(group.shape, np.arange(max_batch + 1), device, ranks,
                                               options=group.options)
    return table
