"""Cells of a sweep over steps that may read selected pages."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.policy.selecting import selection_prices
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.pricing.selected import selected_step_time
from pkvsim.selection.setup import SelectionSetup
from pkvsim.shapes import DecodeShape
from pkvsim.studies.selection.step import SELECTED


def selected_cell(
    cell: Mapping[str, Any], setup: SelectionSetup | None, shape: DecodeShape, device: DeviceSpec, layers: int
) -> dict[str, Any]:
    """What of a step's cell changes where its layers may select (setup: None, they may not): the price of the route
    "selected", and the cell's own where the step takes it. Raises ValueError naming what no kernel serves."""
    if setup is None:
        return {}
    lens = np.full(cell["batch"], cell["length"], np.int32)
    prices = selection_prices(shape, device, setup)
    layer, issue_us = prices.of(lens), prices.prices.run_us / setup.every
    us = sum(selected_step_time(prices.constants, len(lens), layers, layer.selected_us, issue_us))
    routes = {"routes_us": cell["routes_us"] | {SELECTED: us}}
    if not layer.pays or us >= cell["us"]:
        return routes
    listed_bytes = layers * useful_kv_bytes(shape, prices.lists(lens))
    return routes | {"route": SELECTED, "us": us, "kv_gb_s": listed_bytes / us / 1e3}
