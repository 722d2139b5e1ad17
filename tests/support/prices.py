"""A step's prices on every route, called as the policies call them."""
from __future__ import annotations

import numpy as np

from pkvsim.devices.route_model import ROUTES
from pkvsim.options import PLAIN
from pkvsim.pricing.cuts import sorted_lengths
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.prices import Candidates, price_routes
from pkvsim.pricing.step_times import step_times


def layer_prices(lens, shape, constants, num_sms, options=PLAIN, reach=0):
    """(kernel us of one layer, splits of the longest row) by route."""
    prices, splits = np.empty(len(ROUTES)), np.empty(len(ROUTES), np.int64)
    none = np.zeros(len(ROUTES), np.int64)
    candidates = Candidates(constants, none + reach, none)
    price_routes(sorted_lengths(np.asarray(lens)), heads_of(shape, num_sms, options), candidates, prices, splits)
    return prices, splits


def step_prices(lens, layers, constants, layer_us):
    """us of a step of `layers` layers by route, by the wall clock."""
    gpu_us, host_us = np.empty((2, len(ROUTES)))
    step_times(sorted_lengths(np.asarray(lens)), layers, constants, layer_us, gpu_us, host_us)
    return gpu_us + host_us
