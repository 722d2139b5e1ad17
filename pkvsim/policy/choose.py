"""The choice of a step's route, compiled: replay, serving, sweeps and the GPU's router all come here.

A policy is who may be taken (`allowed`) and by which rule; what can be taken at all follows from the GPU's models and
from what each route serves (pkvsim.devices.route_options).
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pkvsim.compiled import compiled, drop_stale, merged
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel, constants_matrix
from pkvsim.devices.route_options import as_read, needs, serving_routes, unserved
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.paper_rules import FLASHINFER, PaperRules, paper_choice
from pkvsim.pricing.constants import BUCKETS, RULE
from pkvsim.pricing.layer import Heads, heads_of
from pkvsim.pricing.prices import Candidates, least_bucket_us, price_candidate, price_route, price_routes
from pkvsim.pricing.step_times import step_time, step_times
from pkvsim.shapes import DecodeShape

CHEAPEST, PAPER = range(2)  # how a policy decides
NO_PAPER = PaperRules(0, 1.0, 0.0, 1.0)
MARGIN = 1e-9  # far above what rounding takes off a price
PINNED_ROUTES = ("split", "workqueue")  # whose splits the host chooses row by row, and may pin


class Routing(NamedTuple):
    """What the choice depends on beside the rows: made once for a kind of layer, a GPU and a policy."""

    heads: Heads
    candidates: Candidates  # NaN for routes that the GPU lacks, or that do not serve the layer
    allowed: np.ndarray  # [num_routes] bool, what the policy may take, candidates all of them
    rule: int  # CHEAPEST of the allowed routes, or PAPER
    paper: PaperRules
    paper_routes: np.ndarray  # [3] int64, the routes that stand for FLASHINFER, SPLIT and WORKQUEUE


class Prices(NamedTuple):
    """What a choice leaves behind, by route; infinity for what is no candidate."""

    layer_us: np.ndarray  # [num_routes] float64, kernel time of a layer that follows another
    splits: np.ndarray  # [num_routes] int64, of the longest row
    gpu_us: np.ndarray  # [num_routes] float64, all layers on a GPU that never waits for the host
    host_us: np.ndarray  # [num_routes] float64, what the step takes by the wall clock above that


def new_prices() -> Prices:
    """Room for the prices of ROUTES."""
    layer_us, gpu_us, host_us = np.full((3, len(ROUTES)), np.inf)
    return Prices(layer_us, np.zeros(len(ROUTES), np.int64), gpu_us, host_us)


def make_routing(
    shape: DecodeShape,
    models: Mapping[str, RouteModel],
    device: DeviceSpec,
    *,
    options: AttentionOptions = PLAIN,
    available: Sequence[str] = ROUTES,
    allowed: Sequence[str] = ROUTES,
    pinned: Mapping[str, int | None] | None = None,
    paper: PaperRules | None = None,
    name: str = "available",
) -> Routing:
    """The routing of a kind of layer on a GPU whose routes have these models.

    available: routes to price; allowed: those of them to choose among. pinned: splits of every row by route. paper: the
    paper's policy chooses, by these numbers. name: of the argument that a ValueError names, where no allowed route
    serves the layer or the GPU has a model of none.
    """
    unknown = [route for route in available if route not in ROUTES]
    if unknown or not available:
        raise ValueError(f"{name}: expected some of {', '.join(ROUTES)}, got {available!r}")
    serving = serving_routes(shape, options, tuple(available))
    taken = [route for route in allowed if route in available]
    if not taken:
        raise ValueError(f"{name}: expected {', '.join(allowed)} among them, got {', '.join(available)}")
    if not set(taken) & set(serving):
        raise ValueError(
            f"{name}: expected a route that serves {needs(shape, options)}, got {unserved(shape, options, taken)}"
        )
    if not any(route in models for route in taken if route in serving):
        raise ValueError(f"{name}: expected a route that {device.name} has a model of, got {', '.join(taken)}")
    constants = constants_matrix(dict(models), serving)
    known = ~np.isnan(constants[:, 0])
    tensor_core, cuda_core, split, workqueue = map(
        ROUTES.index, ("flashinfer_tensor_core", "flashinfer_cuda_core", "split", "workqueue")
    )
    return Routing(
        heads=heads_of(shape, device.num_sms, options),
        candidates=Candidates(
            constants=constants,
            reaches=np.array([as_read(route, options).reach or 0 for route in ROUTES], np.int64),
            pinned=np.array([(pinned or {}).get(route) or 0 for route in ROUTES], np.int64),
        ),
        allowed=known & np.isin(ROUTES, taken),
        rule=CHEAPEST if paper is None else PAPER,
        paper=NO_PAPER if paper is None else paper,
        paper_routes=np.array([tensor_core if known[tensor_core] else cuda_core, split, workqueue]),
    )


@merged
def choose(ordered: np.ndarray, layers: int, routing: Routing, prices: Prices) -> int:
    """The route, as an index into ROUTES, of a step of `layers` layers planned once; -1 where none is allowed.

    ordered [rows] int64 > 0: the rows' lengths, longest first, as pkvsim.pricing.cuts.sorted_lengths gives them.
    prices: filled for every candidate; a price is the step's time by the wall clock, gpu_us + host_us.
    """
    price(ordered, layers, routing, prices)
    return take(ordered, layers, routing, prices)


@merged
def price(ordered: np.ndarray, layers: int, routing: Routing, prices: Prices) -> None:
    """Prices every candidate; choose without the choice."""
    constants = routing.candidates.constants
    price_routes(ordered, routing.heads, routing.candidates, prices.layer_us, prices.splits)
    step_times(ordered, layers, constants, prices.layer_us, prices.gpu_us, prices.host_us)


@merged
def price_contenders(ordered: np.ndarray, layers: int, routing: Routing, prices: Prices) -> None:
    """price for a choice of the cheapest: the paper's split, whose price takes as long as all others where every row
    has a length of its own, is left at infinity where its launches and its bytes alone take longer than an allowed
    route. It cannot be the cheapest then, of the allowed routes or of all."""
    candidates, allowed = routing.candidates, routing.allowed
    constants, distinct, tokens, best_us = candidates.constants, 0, np.int64(0), math.inf
    for row in range(len(ordered)):
        distinct += row == 0 or ordered[row] != ordered[row - 1]
        tokens += ordered[row]
    for turn in range(2):
        for route in range(len(constants)):
            in_buckets = constants[route, RULE] == BUCKETS
            if in_buckets != (turn == 1):
                continue
            us, splits = math.inf, np.int64(0)
            if in_buckets and candidates.reaches[route] == 0:
                least_us = least_bucket_us(distinct, tokens, routing.heads, constants[route])
                gpu_us, host_us = step_time(constants[route], len(ordered), distinct, layers, least_us)
                if (gpu_us + host_us) * (1.0 - MARGIN) > best_us:
                    prices.layer_us[route], prices.splits[route] = us, splits
                    prices.gpu_us[route], prices.host_us[route] = math.inf, 0.0
                    continue
            us, splits = price_candidate(ordered, routing.heads, candidates, route)
            gpu_us, host_us = math.inf, 0.0
            if us < math.inf:
                gpu_us, host_us = step_time(constants[route], len(ordered), distinct, layers, us)
            prices.layer_us[route], prices.splits[route] = us, splits
            prices.gpu_us[route], prices.host_us[route] = gpu_us, host_us
            if allowed[route]:
                best_us = min(best_us, gpu_us + host_us)


@merged
def take(ordered: np.ndarray, layers: int, routing: Routing, prices: Prices) -> int:
    """The route by these prices; what the paper takes of our routes gets the price of its splits."""
    if routing.rule == PAPER:
        taken = _take_as_paper(ordered, layers, routing, prices)
    else:
        taken = cheapest(routing.allowed, prices)
    return taken


@compiled
def cheapest(allowed: np.ndarray, prices: Prices) -> int:
    """The allowed route of the least price, the first of equals; -1 where none is allowed."""
    taken = -1
    for route in range(len(allowed)):
        if allowed[route]:
            us = prices.gpu_us[route] + prices.host_us[route]
            if taken < 0 or us < prices.gpu_us[taken] + prices.host_us[taken]:
                taken = route
    return taken


@merged
def _take_as_paper(ordered: np.ndarray, layers: int, routing: Routing, prices: Prices) -> int:
    """The paper's choice; what it takes of our routes is priced with the splits that the paper gives it."""
    heads, candidates = routing.heads, routing.candidates
    choice, splits = paper_choice(
        ordered, heads.num_kv_heads, heads.columns, heads.head_dim, heads.kv_element_bytes, heads.num_sms, routing.paper
    )
    route = routing.paper_routes[choice]
    if choice != FLASHINFER:
        constants = candidates.constants[route]
        prices.splits[route] = splits
        prices.layer_us[route], _ = price_route(ordered, ordered, heads, constants, splits)
        distinct = 0
        for row in range(len(ordered)):
            distinct += row == 0 or ordered[row] != ordered[row - 1]
        prices.gpu_us[route], prices.host_us[route] = step_time(
            constants, len(ordered), distinct, layers, prices.layer_us[route]
        )
    return route


drop_stale("pkvsim")
