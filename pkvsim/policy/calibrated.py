"""Our policy: the cheapest route by the model calibrated on this GPU."""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.devices.route_options import as_read, read_lens
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.choose import PINNED_ROUTES, Prices, Routing, choose, make_routing, new_prices
from pkvsim.policy.decision import Decision
from pkvsim.pricing.constants import TILE
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.pricing.cuts import row_splits, sorted_lengths, tokens_read
from pkvsim.pricing.prices import price_route
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens

INFINITE = float("inf")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What choosing needs of one shape, device and set of options, made once."""

    routing: Routing
    prices: Prices  # scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedPolicy:
    """The cheapest available route by the closed form of what a step takes by the wall clock.

    allowed: routes to choose among; the others that are available are priced all the same. split_splits,
    workqueue_splits: pinned splits of every row; None lets the model choose. Raises ValueError naming the argument.
    """

    name: ClassVar[str] = "calibrated"
    allowed: tuple[str, ...] = ROUTES
    split_splits: int | None = None
    workqueue_splits: int | None = None
    _prepared: dict[tuple[object, ...], Prepared] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("split_splits", "workqueue_splits"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, MAX_TOKENS)

    def decide(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, *, layers: int = 1,
        available: tuple[str, ...] = ROUTES, options: AttentionOptions = PLAIN,
    ) -> Decision:  # fmt: skip
        """The cheapest route for seq_lens [batch_size] (zero-length rows are not active), planned once for `layers`.

        A price is the wall time of the step: planning, issuing the first layer and synchronising, which the GPU waits
        for, and all layers' kernels; or the host's time to issue the layers after the first, where their kernels take
        less. Inside a captured graph nothing is issued or planned layer by layer: there, and with many layers, the
        kernels decide, and a choice that hangs on the host's part matters little.

        available: routes to choose among; leave FlashInfer's out where it is not installed. int32 arrays are taken as
        they are, with lengths >= 0 taken for granted, because checking would cost as much as deciding; anything else is
        checked and converted.
        options: routes that do not serve them (pkvsim.devices.route_options) take no part. A window is priced by the
        tiles that a route reads, query tokens as further query heads, V's head_dim by its bytes; soft cap and sinks, a
        few instructions a logit, as nothing; an 8-bit cache by its bytes and its scales', with a 16-bit one's
        arithmetic. The constants are fitted to plain attention.
        Raises ValueError naming the argument.
        """
        if type(seq_lens) is not np.ndarray or seq_lens.dtype != np.int32 or seq_lens.ndim != 1:
            seq_lens = check_seq_lens(seq_lens)
        ready = self._ready(shape, device, available, options, self.allowed)
        ordered = sorted_lengths(seq_lens)
        best = self._choose(shape, seq_lens, ordered, device, ready, layers, options)
        return self._decision(shape, seq_lens, device, ready, best, options)

    def _choose(
        self, shape: DecodeShape, seq_lens: np.ndarray, ordered: np.ndarray, device: DeviceSpec, ready: Prepared,
        layers: int, options: AttentionOptions,
    ) -> int:  # fmt: skip
        """The route of a step, as an index; fills ready.prices. ordered [rows] int64 > 0: seq_lens, longest first."""
        return choose(ordered, layers, ready.routing, ready.prices)

    def _decision(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, ready: Prepared, best: int,
        options: AttentionOptions,
    ) -> Decision:  # fmt: skip
        host = ready.prices.host_us.tolist()
        totals = [gpu + host_us for gpu, host_us in zip(ready.prices.gpu_us.tolist(), host)]
        route = ROUTES[best]
        splits = None
        if route in PINNED_ROUTES:
            longest = int(ready.prices.splits[best])
            splits = self.split_counts(route, shape, seq_lens, device, longest_splits=longest, options=options)
        prices = {name: us for name, us in zip(ROUTES, totals) if us != INFINITE}
        host_us, layer_us = dict(zip(ROUTES, host)), dict(zip(ROUTES, ready.prices.layer_us.tolist()))
        why = partial(_reason, route, prices, host_us, shape, seq_lens, options)
        return Decision(route, splits, prices, why, host_us, layer_us)

    def pinned_splits(self, route: str) -> int | None:
        """Splits of every row that the route was pinned to, None where the model or the route chooses."""
        return {"split": self.split_splits, "workqueue": self.workqueue_splits}.get(route)

    def split_counts(
        self, route: str, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, *,
        longest_splits: int | None = None, options: AttentionOptions = PLAIN,
    ) -> np.ndarray:  # fmt: skip
        """Splits of each row [batch_size] int64 on "split" or "workqueue": pinned, or as the model chooses them."""
        pinned = self.pinned_splits(route)
        if pinned is not None:
            return np.full(len(seq_lens), pinned, np.int64)
        routing = self._ready(shape, device, (route,), options, (route,)).routing
        index = ROUTES.index(route)
        constants = routing.candidates.constants[index]
        if longest_splits is None:
            ordered, reach = sorted_lengths(seq_lens), int(routing.candidates.reaches[index])
            read = tokens_read(ordered, reach, constants) if reach else ordered
            _, longest_splits = price_route(ordered, read, routing.heads, constants, 0)
        reads = read_lens(seq_lens, as_read(route, options).reach, int(constants[TILE]))
        counts = np.empty(len(seq_lens), np.int64)
        row_splits(seq_lens, reads, shape.num_kv_heads, device.num_sms, constants, longest_splits, counts)
        return counts

    def _ready(
        self, shape: DecodeShape, device: DeviceSpec, available: tuple[str, ...], options: AttentionOptions,
        allowed: tuple[str, ...],
    ) -> Prepared:  # fmt: skip
        key = shape, device, available, options, allowed
        ready = self._prepared.get(key)
        if ready is None:
            routing = make_routing(
                shape, device_routes(device), device, options=options, available=available, allowed=allowed,
                pinned={"split": self.split_splits, "workqueue": self.workqueue_splits},
            )  # fmt: skip
            ready = self._prepared[key] = Prepared(routing, new_prices())
        return ready


def _reason(
    route: str, prices: dict[str, float], host_us: dict[str, float], shape: DecodeShape, seq_lens: np.ndarray,
    options: AttentionOptions,
) -> str:  # fmt: skip
    active = int(np.count_nonzero(seq_lens))
    if not active:
        return "no active row"
    others = sorted((us, name) for name, us in prices.items() if name != route)
    megabytes = useful_kv_bytes(shape, seq_lens, options) / 1e6
    step = f"{active} rows, {megabytes:.0f} MB of KV"
    if not others:
        return f"{route} alone is available: {prices[route]:.0f} us for {step}"
    margin = 1 - prices[route] / others[0][0]
    listed = ", ".join(f"{name} {us:.0f} us{_host(host_us[name])}" for us, name in others)
    return f"{route} {prices[route]:.0f} us{_host(host_us[route])}, {margin:.0%} under the next for {step}: {listed}"


def _host(host_us: float) -> str:
    return f" ({host_us:.0f} on the host)" if host_us else ""
