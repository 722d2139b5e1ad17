"""What selected pages cost and save in the serving loop. Compiled.

A kind of layers selects in a step where pkvsim.policy.selecting says so against the balanced route's price of all
pages; the balanced route is then priced with lists, and taken where it is the cheapest allowed.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pkvsim.compiled import merged
from pkvsim.devices.derive import selection_entry
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.devices.selection_constants import SelectionConstants
from pkvsim.models.decode_groups import DecodeGroup
from pkvsim.policy.choose import Prices
from pkvsim.policy.selecting import pays
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.selected import ListRule, list_rule, selected_step_time, selected_us, tokens_of_list
from pkvsim.selection.setup import IN_16_BITS, SelectionSetup, head_summary_bytes
from pkvsim.serving.selection.memory import selecting_layers

BALANCED_ROUTE = ROUTES.index("balanced")
# Of RunLog.selected: steps that select; over their selecting layers bytes of lists, bytes of the same rows' pages and
# bytes of summaries scored; us saved.
SELECTED_STEPS, LISTED_BYTES, WHOLE_BYTES, SCORED_BYTES, SELECTION_SAVED_US = range(5)
NUM_SELECTED = 5


class Selecting(NamedTuple):
    """Which kinds of layers select, and at what prices."""

    any: bool
    layers: np.ndarray  # [K] int64, layers of the kind that select
    rule: ListRule
    prices: SelectionConstants
    issue_us: float  # host time that selecting takes a layer, 0 in captured graphs


def make_selecting(
    groups: Sequence[DecodeGroup], device: DeviceSpec, setup: SelectionSetup | None, *, graphs: bool
) -> Selecting:
    """Of the kinds of layers that routes serve. setup: None where the server selects nothing."""
    if setup is None:
        nothing = SelectionConstants(*[1.0] * len(SelectionConstants._fields))
        return Selecting(False, np.zeros(len(groups), np.int64), ListRule(1, 0, 0, 1, IN_16_BITS), nothing, 0.0)
    layers, prices = np.array(selecting_layers(groups, setup), np.int64), selection_entry(device).constants
    issue_us = 0.0 if graphs else prices.run_us / setup.every
    return Selecting(bool(layers.any()), layers, list_rule(setup), prices, issue_us)


@merged
def select_pages(
    lens: np.ndarray,  # [rows] int64, longest first
    kind: int,
    layers: int,
    heads: Heads,
    constants: np.ndarray,  # [NUM_CONSTANTS] float64, of the balanced route
    selecting: Selecting,
    prices: Prices,
) -> tuple[float, float, float]:
    """Lowers the balanced route's price of the kind's layers to that of selected pages where that pays; (bytes of
    lists, bytes of the same rows' pages, bytes of summaries) of the layers that select, zeros where all go dense."""
    listed, whole, scored = 0.0, 0.0, 0.0
    dense_us = prices.layer_us[BALANCED_ROUTE]
    if dense_us < np.inf:
        us = selected_us(lens, heads, constants, selecting.rule, selecting.prices)
        layer_us = us.keep + us.select + us.attend
        if pays(dense_us, layer_us):
            chosen = selecting.layers[kind]
            mean_us = (chosen * layer_us + (layers - chosen) * dense_us) / layers
            gpu_us, host_us = selected_step_time(
                constants, len(lens), layers, mean_us, selecting.issue_us * chosen / layers
            )
            # Outside a graph the host may take longer to issue what the GPU is done with sooner.
            if gpu_us + host_us <= prices.gpu_us[BALANCED_ROUTE] + prices.host_us[BALANCED_ROUTE]:
                prices.layer_us[BALANCED_ROUTE] = mean_us
                prices.gpu_us[BALANCED_ROUTE], prices.host_us[BALANCED_ROUTE] = gpu_us, host_us
                token_bytes = heads.num_kv_heads * (heads.head_dim + heads.v_head_dim) * heads.kv_element_bytes
                summary_bytes = heads.num_kv_heads * head_summary_bytes(heads.head_dim, selecting.rule.form)
                for row in range(len(lens)):
                    listed += tokens_of_list(lens[row], heads.page_size, selecting.rule) * token_bytes * chosen
                    whole += lens[row] * token_bytes * chosen
                    pages = (lens[row] + heads.page_size - 1) // heads.page_size
                    scored += pages * summary_bytes * chosen / selecting.rule.every
    return listed, whole, scored


def selection_summary(totals: Sequence[np.ndarray], attention_us: float, decode_steps: int) -> dict[str, Any]:
    """What selected pages gave to a run, of several servers together. attention_us: of all its decode attention."""
    steps, listed, whole, scored, saved_us = np.sum(totals, axis=0).tolist()
    return {
        "steps": int(steps),
        "step_share": steps / decode_steps if decode_steps else None,
        "listed_bytes": listed,
        "whole_bytes": whole,
        "scored_bytes": scored,
        "attention_us_dense": attention_us + saved_us,
        "saved_share": saved_us / (attention_us + saved_us) if attention_us else None,
    }
