"""What a layer's price depends on beside its rows: its heads, and how fast one route works through them. Compiled."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import inner
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.constants import (
    PARTIAL_ELEMENT_BYTES,
    RULE,
    TILE,
    balanced_costs,
    cta_slots,
    read_speeds,
    sm_gb_s,
)
from pkvsim.schedule.costs import BalancedCosts, paired, segment_of
from pkvsim.shapes import DecodeShape

_paired = inner(paired)
_segment_of = inner(segment_of)


class Heads(NamedTuple):
    """A layer's attention as plain numbers, and the SMs that it runs on."""

    num_kv_heads: int
    columns: int  # query heads of a KV head, times the query tokens of a row
    head_dim: int  # of K
    v_head_dim: int
    kv_element_bytes: float  # of K and V, the bytes of their scales shared out
    page_size: int  # tokens
    num_sms: int


class Layer(NamedTuple):
    """One layer on one route. A token is one of one KV head: its K and V."""

    constants: np.ndarray  # [NUM_CONSTANTS] float64
    rule: int  # index into RULES
    num_kv_heads: int
    columns: int  # as in Heads
    num_sms: int
    slots: int  # CTAs that run at a time
    tile: int  # tokens at whose multiples rows are cut
    alone_us: float  # a token, where one CTA runs alone
    shared_us: float  # a token and running CTA, where all share the bandwidth
    arithmetic_us: float  # a token, by the arithmetic of one SM
    state_bytes: float  # of a task's partial state
    costs: BalancedCosts


def heads_of(shape: DecodeShape, num_sms: int, options: AttentionOptions = PLAIN) -> Heads:
    """The heads of a shape with these options."""
    return Heads(
        num_kv_heads=shape.num_kv_heads,
        columns=options.query_shape(shape).group_size,
        head_dim=shape.head_dim,
        v_head_dim=options.value_dim(shape),
        kv_element_bytes=float(options.kv_element_bytes(shape)),
        page_size=shape.page_size,
        num_sms=num_sms,
    )


@inner
def make_layer(heads: Heads, constants: np.ndarray, tokens: int) -> Layer:
    """A layer whose rows read so many tokens of each KV head."""
    token_bytes = (heads.head_dim + heads.v_head_dim) * heads.kv_element_bytes
    kv_bytes = tokens * heads.num_kv_heads * token_bytes
    alone, shared = read_speeds(constants, kv_bytes, heads.columns, heads.kv_element_bytes, heads.num_sms)
    costs = balanced_costs(constants)
    pair = _paired(costs.pair, heads.columns, heads.v_head_dim, heads.kv_element_bytes, heads.page_size)
    return Layer(
        constants,
        int(constants[RULE]),
        heads.num_kv_heads,
        heads.columns,
        heads.num_sms,
        cta_slots(constants, heads.num_sms),
        int(constants[TILE]),
        token_bytes / alone,
        token_bytes / shared,
        token_bytes / (sm_gb_s(constants, heads.columns, heads.kv_element_bytes) * 1e3),
        heads.columns * (2 + heads.v_head_dim) * float(PARTIAL_ELEMENT_BYTES),
        BalancedCosts(_segment_of(costs.segment, heads.columns), costs.minimum, costs.part, pair),
    )
