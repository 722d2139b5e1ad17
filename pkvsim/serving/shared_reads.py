"""Rows whose prompts begin with the same blocks read these once: which rows, and what the balanced route then costs.

The prefix cache keeps one copy of a block, so rows with equal leading blocks have equal page ids. Groups are those of
pkvsim.schedule.prefixes over whole blocks, found again when other rows decode, as an engine plans such a step anew. A
kind of layers reads together only where that is cheaper than every row reading for itself. Compiled.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pkvsim.compiled import compiled, inner, merged
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel
from pkvsim.memory.prefix_cache import PromptBlocks
from pkvsim.models.decode_groups import DecodeGroup
from pkvsim.policy.choose import Prices
from pkvsim.pricing.constants import TILE
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.shared import ReadPrices, read_prices
from pkvsim.pricing.shared_us import read_tokens, shared_layer, shared_us
from pkvsim.pricing.step_times import step_time
from pkvsim.schedule.costs import SHARED_COLUMNS, SharedCosts, columns_for
from pkvsim.schedule.prefix_trees import group_sorted
from pkvsim.schedule.prefixes import sharing_rule

_columns_for = inner(columns_for)

BALANCED_ROUTE = ROUTES.index("balanced")
HEAD_DIMS = 64, 256  # least and most of the kernels that read for several rows
READ_COLUMNS = (SHARED_COLUMNS // 2, SHARED_COLUMNS)  # of the reads that columns_for chooses among
ROW_BITS = 17  # of a key that sorts rows, of which there are at most 2^16
NUM_ROWS, NUM_GROUPS = range(2)  # of Grouping.counts
SHARED_STEPS, READ_BYTES, APART_BYTES, SAVED_US = range(4)  # of Grouping.totals


class Sharing(NamedTuple):
    """Which kinds of layers read for several rows, and at what prices."""

    kinds: np.ndarray  # [K] bool
    any: bool
    prices: np.ndarray  # [K, 2, 5] float64, the fields of ReadPrices for reads of READ_COLUMNS
    costs: np.ndarray  # [5] int64, the fields of SharedCosts
    tokens_per_member: int  # of SharingRule
    least_tokens: int


class Grouping(NamedTuple):
    """The groups of the rows that decode, and what sharing has given so far."""

    counts: np.ndarray  # [2] int64
    requests: np.ndarray  # [max_batch] int64, the rows that were grouped
    order: np.ndarray  # [max_batch] int64, scratch: rows by their blocks
    common: np.ndarray  # [max_batch] int64, scratch: blocks that neighbours of that order have in common
    sorted_groups: np.ndarray  # [max_batch] int64, scratch
    group_of_row: np.ndarray  # [max_batch] int64, of each row the group or -1
    prefix_tokens: np.ndarray  # [max_batch] int64, of each group
    members: np.ndarray  # [max_batch] int64, of each group
    totals: np.ndarray  # [4] float64, sums over steps: steps, bytes by reads, bytes of the same apart, us saved


def new_grouping(most_rows: int) -> Grouping:
    """Nothing was grouped."""
    arrays = [np.zeros(most_rows, np.int64) for _ in range(7)]
    return Grouping(np.array([-1, 0]), *arrays, np.zeros(4))


def make_sharing(
    groups: Sequence[DecodeGroup], balanced: RouteModel | None, device: DeviceSpec, *, share: bool
) -> Sharing:
    """Of the kinds of layers that routes serve. balanced: the route's model, None where the GPU has none. share:
    whether the server reads together at all.

    A kind reads together whose layers see all tokens, whose heads the kernels serve, and of whose rows a read of
    the fewest columns serves two.
    """
    prices = np.full((len(groups), 2, len(ReadPrices._fields)), np.nan)
    kinds = np.zeros(len(groups), bool)
    rule = None
    for kind, group in enumerate(groups):
        shape, options = group.shape, group.options
        if not share or balanced is None or shape is None or options is None or not reads_together(group):
            continue
        kinds[kind] = True
        rule = sharing_rule(shape, bandwidth_gb_per_s=balanced.bandwidth_gb_s, options=options)
        for at, columns in enumerate(READ_COLUMNS):
            prices[kind, at] = read_prices(balanced, device, shape, options, SharedCosts(columns=columns))
    return Sharing(
        kinds, bool(kinds.any()), prices, np.array(SharedCosts(), np.int64),
        rule.tokens_per_member if rule else 0, rule.least_tokens if rule else 0,
    )  # fmt: skip


def reads_together(group: DecodeGroup) -> bool:
    """Whether kernels that read for several rows serve this kind of layers."""
    shape, options = group.shape, group.options
    if shape is None or options is None or group.attention.window or group.attention.selected_entries:
        return False
    columns, dims = options.query_shape(shape).group_size, (shape.head_dim, options.value_dim(shape))
    return (
        options.reach is None and 2 * columns <= READ_COLUMNS[0]
        and all(HEAD_DIMS[0] <= dim <= HEAD_DIMS[1] for dim in dims)
    )  # fmt: skip


def block_places(blocks: PromptBlocks, prompt_tokens: np.ndarray, block_tokens: int) -> np.ndarray:
    """Of each prompt its place among all when they are sorted by their whole blocks, and where these begin and end in
    blocks.ids, int64 [n, 3].

    Only blocks of block_tokens tokens are read together: what a prompt's last block holds may end within a page.
    """
    begins = blocks.offsets[:-1]
    ends = np.minimum(begins + prompt_tokens // block_tokens, blocks.offsets[1:])
    names = [blocks.ids[begin:end].astype(">u4").tobytes() for begin, end in zip(begins, ends)]
    ranks = np.empty(len(names), np.int64)
    ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return np.stack((ranks, begins, ends), axis=1)


@merged
def are_grouped(decoding: np.ndarray, grouping: Grouping) -> bool:
    """Whether the groups are those of these rows, decoding [rows] int64."""
    same = grouping.counts[NUM_ROWS] == len(decoding)
    at = 0
    while same and at < len(decoding):
        same = grouping.requests[at] == decoding[at]
        at += 1
    return same


@compiled
def group_rows(
    decoding: np.ndarray,  # [rows] int64, requests
    places: np.ndarray,  # [n, 3] int64, as block_places gives them: a line of the CPU's cache for each row
    ids: np.ndarray,  # of pkvsim.memory.prefix_cache.PromptBlocks
    block_tokens: int,
    tokens_per_member: int,  # of SharingRule
    least_tokens: int,
    grouping: Grouping,
) -> None:
    """Groups the rows that decode."""
    rows, counts, requests = len(decoding), grouping.counts, grouping.requests
    counts[NUM_ROWS] = rows
    requests[:rows] = decoding
    order = grouping.order[:rows]
    for row in range(rows):
        order[row] = places[decoding[row], 0] << ROW_BITS | row
    gap = rows // 2
    while gap > 0:  # Shell's sort, for the reason that pkvsim.serving.attention gives
        for at in range(gap, rows):
            key = order[at]
            while at >= gap and order[at - gap] > key:
                order[at] = order[at - gap]
                at -= gap
            order[at] = key
        gap //= 2
    for row in range(rows):
        order[row] &= (1 << ROW_BITS) - 1
    for at in range(rows - 1):
        one, other = requests[order[at]], requests[order[at + 1]]
        a, b, depth = places[one, 1], places[other, 1], 0
        most = min(places[one, 2] - a, places[other, 2] - b)
        while depth < most and ids[a + depth] == ids[b + depth]:
            depth += 1
        grouping.common[at] = depth
    counts[NUM_GROUPS] = group_sorted(
        grouping.common[: max(0, rows - 1)], block_tokens, tokens_per_member, least_tokens,
        grouping.sorted_groups[:rows], grouping.prefix_tokens,
    )  # fmt: skip
    for group in range(counts[NUM_GROUPS]):
        grouping.prefix_tokens[group] *= block_tokens
        grouping.members[group] = 0
    for at in range(rows):
        group = grouping.sorted_groups[at]
        grouping.group_of_row[order[at]] = group
        if group >= 0:
            grouping.members[group] += 1


@merged
def share_reads(
    lens: np.ndarray,  # [rows] int64, of the rows that were grouped, longest first
    kind: int,
    layers: int,
    heads: Heads,
    constants: np.ndarray,  # [NUM_CONSTANTS] float64, of the balanced route
    sharing: Sharing,
    grouping: Grouping,
    prices: Prices,
) -> tuple[float, float]:
    """Lowers the balanced route's price of the kind's layers to that of shared reads; (bytes by reads, bytes that
    their rows would read of the same pages apart) in all layers, zeros where every row reads for itself."""
    rows, groups, own = len(lens), grouping.counts[NUM_GROUPS], sharing.costs
    costs = SharedCosts(_columns_for(rows * heads.columns), own[1], own[2], own[3], own[4])
    of = sharing.prices[kind, 0 if costs.columns == READ_COLUMNS[0] else 1]
    members, prefixes = grouping.members[:groups], grouping.prefix_tokens[:groups]
    read = read_tokens(lens.sum(), members, prefixes, costs.columns // heads.columns, int(constants[TILE]))
    layer = shared_layer(rows, read.all, heads, constants, ReadPrices(of[0], of[1], of[2], of[3], of[4]), costs)
    token_bytes = heads.num_kv_heads * layer.token_bytes
    # Less than that it cannot be: most steps of little in common end here, for a tenth of the time.
    least_us = layer.start_us + read.all * token_bytes / layer.bandwidth + layer.row_us
    shared = 0.0
    if least_us < prices.layer_us[BALANCED_ROUTE]:
        us = shared_us(lens, grouping.group_of_row[:rows], prefixes, layer)
        if us < prices.layer_us[BALANCED_ROUTE]:  # not where nothing is read together: NaN
            shared = layers * token_bytes
            distinct = 0
            for row in range(rows):
                distinct += row == 0 or lens[row] != lens[row - 1]
            prices.layer_us[BALANCED_ROUTE] = us
            prices.gpu_us[BALANCED_ROUTE], prices.host_us[BALANCED_ROUTE] = step_time(
                constants, rows, distinct, layers, us
            )
    return shared * read.reads, shared * read.apart


def sharing_summary(groupings: Sequence[Grouping], attention_us: float, decode_steps: int) -> dict[str, Any]:
    """What shared reads gave to a run, of several servers together. attention_us: of all its decode attention."""
    steps, read_bytes, apart_bytes, saved_us = np.sum([grouping.totals for grouping in groupings], axis=0).tolist()
    return {
        "steps": int(steps),
        "step_share": steps / decode_steps if decode_steps else None,
        "read_bytes": read_bytes,
        "apart_bytes": apart_bytes,
        "attention_us_apart": attention_us + saved_us,
        "saved_share": saved_us / (attention_us + saved_us) if attention_us else None,
    }
