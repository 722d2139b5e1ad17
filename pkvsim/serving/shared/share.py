"""What shared reads cost: on which kinds of layers rows read together, and at what prices. Compiled.

A kind of layers reads together only where that is cheaper than every row reading for itself.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pkvsim.compiled import inner, merged
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel
from pkvsim.models.decode_groups import DecodeGroup
from pkvsim.policy.choose import Prices
from pkvsim.pricing.constants import TILE
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.shared import ReadPrices, by_warpgroups, read_prices
from pkvsim.pricing.shared_us import read_tokens, shared_layer, shared_us
from pkvsim.pricing.step_times import step_time
from pkvsim.schedule.costs import SHARED_COLUMNS, SharedCosts, columns_for, default_shared_costs
from pkvsim.schedule.prefixes import sharing_rule
from pkvsim.serving.shared.grouping import NUM_GROUPS, Grouping

_columns_for = inner(columns_for)

BALANCED_ROUTE = ROUTES.index("balanced")
HEAD_DIMS = 64, 256  # least and most of the kernels that read for several rows
READ_COLUMNS = (SHARED_COLUMNS // 2, SHARED_COLUMNS)  # of the reads that columns_for chooses among


class Sharing(NamedTuple):
    """Which kinds of layers read for several rows, and at what prices."""

    kinds: np.ndarray  # [K] bool
    any: bool
    prices: np.ndarray  # [K, 2, 7] float64, the fields of ReadPrices for reads of READ_COLUMNS
    costs: np.ndarray  # [K, 2, 5] int64, the fields of SharedCosts, of the same
    tokens_per_member: int  # of SharingRule
    least_tokens: int


def make_sharing(
    groups: Sequence[DecodeGroup], balanced: RouteModel | None, device: DeviceSpec, *, share: bool
) -> Sharing:
    """Of the kinds of layers that routes serve. balanced: the route's model, None where the GPU has none. share:
    whether the server reads together at all.

    A kind reads together whose layers see all tokens, whose heads the kernels serve, and of whose rows a read of
    the fewest columns serves two.
    """
    prices = np.full((len(groups), 2, len(ReadPrices._fields)), np.nan)
    costs = np.zeros((len(groups), 2, len(SharedCosts._fields)), np.int64)
    kinds = np.zeros(len(groups), bool)
    rule = None
    for kind, group in enumerate(groups):
        shape, options = group.shape, group.options
        if not share or balanced is None or shape is None or options is None or not reads_together(group):
            continue
        kinds[kind] = True
        rule = sharing_rule(shape, bandwidth_gb_per_s=balanced.bandwidth_gb_s, options=options)
        for at, columns in enumerate(READ_COLUMNS):
            weighed = default_shared_costs(
                columns, row_columns=options.query_shape(shape).group_size, value_dim=options.value_dim(shape),
                by_warpgroups=by_warpgroups(device, shape, options),
            )  # fmt: skip
            costs[kind, at] = weighed
            prices[kind, at] = read_prices(balanced, device, shape, options, weighed)
    return Sharing(
        kinds, bool(kinds.any()), prices, costs,
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
    rows, groups = len(lens), grouping.counts[NUM_GROUPS]
    at = 0 if _columns_for(rows * heads.columns) == READ_COLUMNS[0] else 1
    of, own = sharing.prices[kind, at], sharing.costs[kind, at]
    costs = SharedCosts(own[0], own[1], own[2], own[3], own[4])
    members, prefixes = grouping.members[:groups], grouping.prefix_tokens[:groups]
    read = read_tokens(lens.sum(), members, prefixes, costs.columns // heads.columns, int(constants[TILE]))
    priced = ReadPrices(of[0], of[1], of[2], of[3], of[4], of[5], of[6])
    layer = shared_layer(rows, read.all, heads, constants, priced, costs)
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
