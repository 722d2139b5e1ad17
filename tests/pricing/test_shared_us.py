"""The closed form of steps with shared reads against a plain statement of its laws, span by span."""
from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_cases import SharedBatch, balanced_costs, shared_batches

from pkvsim import AttentionOptions, DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.pricing.constants import read_speeds
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.shared import REREAD_SPEEDUP, read_prices
from pkvsim.pricing.shared_us import SharedLayer, shared_layer, shared_us
from pkvsim.schedule.costs import EIGHTHS, SharedCosts
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.make import make_schedule
from pkvsim.schedule.spans import find_reads
from pkvsim.timeline.shared import kernel_costs

H200 = get_device("h200")
MODEL = H200.routes["balanced"]
TILE = 16
FEW_US, MANY_US = st.sampled_from([0.0, 0.05, 2.0]), st.sampled_from([0.0, 3.0, 200.0, 4000.0])


@st.composite
def layers(draw: st.DrawFn) -> SharedLayer:
    """What a CTA reads by itself lies about its part of the bandwidth, so that now one and now the other bounds it."""
    slots, bandwidth = draw(st.integers(1, 40)), draw(st.sampled_from([0.5, 5.0, 40.0]))
    parts = draw(st.sampled_from([(20, 0.2), (20, 0.2), (0.2, 20), (20, 20), (0.9, 1.4), (1.4, 0.9), (0.2, 0.2)]))
    alone, reading = (part * bandwidth / slots for part in parts)
    return SharedLayer(
        num_kv_heads=0, columns=0, slots=slots, tile=TILE, token_bytes=draw(st.sampled_from([1.0, 4.0])),
        start_us=draw(MANY_US), segment_us=draw(MANY_US), read_us=draw(FEW_US), row_us=draw(MANY_US),
        state_us=draw(MANY_US), alone=alone, reading=reading, read_share=draw(st.sampled_from([0.1, 0.5, 1.0])),
        bandwidth=bandwidth, again_bytes=draw(st.sampled_from([0.0, 200.0, 4000.0, 1e9])), costs=draw(balanced_costs),
        shared=SharedCosts(),
    )  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> SharedBatch:
    """Rows that share, beside others that may have most of the tokens."""
    batch = draw(shared_batches(max_rows=12, max_pages=60))
    others = draw(st.lists(st.sampled_from([0, 7, 1000, 5001, 20_000]), max_size=3))
    groups = PrefixGroups([*batch.groups.group_of_row.tolist(), *[-1] * len(others)], batch.groups.prefix_pages)
    lens = batch.lens + [length if length >= batch.query_tokens else 0 for length in others]
    return replace(batch, lens=lens, groups=groups)


class Own(NamedTuple):
    """What a row reads of one KV head for itself."""

    tokens: int
    cost: int  # tiles
    read: int  # whose member it is, -1 of none


class Kind(NamedTuple):
    """Ranges of one kind that begin together."""

    ranges: float
    speed: float  # of each at most
    share: float  # of a bandwidth that is used up, in shares of the other kind
    bytes: float  # of each
    fixed_us: float  # of each

    def speed_beside(self, other: Kind, bandwidth: float) -> float:
        """Of one range: its part of the bandwidth by shares, and what the other kind leaves of its own part."""
        level = bandwidth / (self.ranges * self.share + other.ranges * other.share)
        left = bandwidth - other.ranges * min(other.speed, level * other.share)
        return min(self.speed, max(level * self.share, left / self.ranges))


def ended_us(one: Kind, other: Kind, bandwidth: float) -> float:
    """When both have ended: what takes longer goes on alone."""
    speeds = one.speed_beside(other, bandwidth), other.speed_beside(one, bandwidth)
    took = [kind.fixed_us + kind.bytes / speed for kind, speed in zip((one, other), speeds)]
    first = min(took)
    alone = [min(kind.speed, bandwidth / kind.ranges) for kind in (one, other)]
    return first + max((us - first) * now / then for us, now, then in zip(took, speeds, alone))


def plain_us(batch: SharedBatch, layer: SharedLayer) -> float:
    """The laws: a step ends with the bandwidth, with ranges full of a group's reads, or with its reads and its rows
    where both run at once, and then with the merges of the range that has most of them."""
    shared, costs, heads = layer.shared, layer.costs, layer.num_kv_heads
    lens = np.array(batch.lens, np.int32)
    found = find_reads(batch.groups, batch.shape, lens, TILE, batch.query_tokens, shared.columns)
    if not len(found.reads):
        return math.nan
    # Reads, of which a group's all cost what the largest does.
    reads = found.reads
    members = (reads["member_end"] - reads["member_begin"]).astype(int)
    columns = [int(members[reads["group"] == group].max()) * layer.columns for group in reads["group"]]
    costs_of = [shared.segment_tiles(count, costs.segment) + math.ceil(tiles * shared.tile_eighths(count) / EIGHTHS)
                for count, tiles in zip(columns, reads["tiles"].tolist())]  # fmt: skip
    outputs = heads * int((found.read_of_row >= 0).sum())
    least_own = shared.least_own(heads * sum(costs_of), outputs)
    own = []
    for row, read in enumerate(found.read_of_row.tolist()):
        tiles = int(found.own_tiles[row])
        tokens = batch.lens[row] - (int(reads["tiles"][read]) * TILE if read >= 0 else 0)
        if tiles or read >= 0:
            least = least_own if read >= 0 else 1
            own += [Own(tokens, costs.segment + max(1, least, tiles), read)] * heads
    schedule = make_schedule(
        "balanced", batch.shape, lens, tile_tokens=TILE, num_ctas=layer.slots, costs=costs, groups=batch.groups,
        query_tokens=batch.query_tokens, shared_costs=shared,
    )  # fmt: skip
    ranges, own_cost = schedule.num_ctas, sum(span.cost for span in own)
    width = (heads * sum(costs_of) + own_cost) / ranges

    # Bytes: a group's later reads find in L2 what its first one has read, where it stays there.
    read_bytes, anew = [heads * tiles * TILE * layer.token_bytes for tiles in reads["tiles"].tolist()], 0.0
    for k, size in enumerate(read_bytes):
        again = size <= layer.again_bytes and reads["group"][k] in reads["group"][:k]
        anew += size / REREAD_SPEEDUP if again else size
    own_bytes = sum(span.tokens for span in own) * layer.token_bytes
    ends_us = heads * sum(columns) * layer.read_us, len(own) * layer.segment_us  # of reads, of rows
    busy = (anew + own_bytes) / layer.bandwidth + sum(ends_us) / ranges
    for group in set(reads["group"].tolist()):
        mine = np.flatnonzero(reads["group"] == group)
        cost, count = costs_of[mine[0]], columns[mine[0]]
        there = min(width, heads * cost * len(mine))  # of a range full of them
        tokens = there * EIGHTHS / shared.tile_eighths(count) * TILE
        busy = max(busy, tokens * layer.token_bytes / layer.reading + max(1.0, there / cost) * count * layer.read_us)
    of_reads, of_rows = max(1.0, heads * sum(costs_of) / width), max(1.0, own_cost / width)
    busy = max(busy, ended_us(
        Kind(of_reads, layer.reading, layer.read_share, sum(read_bytes) / of_reads, ends_us[0] / of_reads),
        Kind(of_rows, layer.alone, 1.0, own_bytes / of_rows, ends_us[1] / of_rows),
        layer.bandwidth * (sum(read_bytes) + own_bytes) / max(layer.token_bytes, anew + own_bytes),
    ))  # fmt: skip

    # Outputs of members, one after the other: first those of one row's heads, and then mean ones in what is left of the
    # range.
    own_states = 1 + own_cost / len(own) / width
    states = [own_states + 1 + costs_of[span.read] / width for span in own if span.read >= 0]
    mean, merging = sum(states) / outputs, 0.0
    for span in {span for span in own if span.read >= 0}:
        there = min(float(heads), width / span.cost)
        others = (width - there * span.cost) / (own_cost / len(own))
        mixed = there * (own_states + 1 + costs_of[span.read] / width) + others * mean
        count = max(1, math.ceil(there + others))
        merging = max(merging, count * (layer.row_us + mixed / (there + others) * layer.state_us))
    return layer.start_us + busy + merging


@settings(max_examples=400, deadline=None)
@given(batch=batches(), layer=layers())
def test_the_closed_form_is_its_laws_span_by_span(batch, layer):
    layer = layer._replace(
        num_kv_heads=batch.shape.num_kv_heads, columns=batch.columns, shared=batch.shared_costs
    )
    lens = np.array(batch.lens, np.int64)
    members = batch.groups.members(
        lens, page_size=batch.shape.page_size, tile_tokens=TILE, query_tokens=batch.query_tokens
    )
    prefixes = batch.groups.prefix_pages.astype(np.int64) * batch.shape.page_size
    want = plain_us(batch, layer)
    assert shared_us(lens, members, prefixes, layer) == pytest.approx(want, rel=1e-9, nan_ok=True)


@given(
    rows=st.integers(1, 300), tokens=st.integers(0, 10**7), query_tokens=st.integers(1, 4), heads=st.integers(1, 9),
    group=st.integers(1, 8), v_head_dim=st.sampled_from([None, 64]), read_gb_s=st.sampled_from([1.0, 1e4]),
)  # fmt: skip
def test_a_layers_numbers_are_those_of_its_route_and_its_reads(
    rows, tokens, query_tokens, heads, group, v_head_dim, read_gb_s
):
    """The start with all queries read and outputs written, two bytes an element; speeds at the bytes of all heads."""
    shape = DecodeShape(heads * group, heads, 128, 16)
    options = AttentionOptions(query_tokens=query_tokens, v_head_dim=v_head_dim)
    row, columns, v_dim = MODEL.to_row(), group * query_tokens, v_head_dim or 128
    reads = read_prices(MODEL, H200, shape, options, SharedCosts())._replace(read_gb_s=read_gb_s)
    layer = shared_layer(rows, tokens, heads_of(shape, H200.num_sms, options), row, reads, SharedCosts())
    alone, bandwidth = read_speeds(row, tokens * heads * (128 + v_dim) * 2.0, columns, 2.0, H200.num_sms)
    moved = rows * heads * columns * (128 + v_dim) * 2.0
    start_us = MODEL.fixed_us + reads.start_us + moved / (MODEL.bandwidth_gb_s * 1e3)
    costs = kernel_costs(MODEL, shape, options)
    assert layer == SharedLayer(
        heads, columns, H200.num_sms, int(MODEL.tile_tokens), (128 + v_dim) * 2.0, pytest.approx(start_us, rel=1e-12),
        MODEL.segment_us, reads.read_us, reads.row_us, reads.state_us, alone, min(alone, read_gb_s * 1e3),
        reads.read_share, bandwidth, reads.again_bytes, costs, SharedCosts(),
    )  # fmt: skip
