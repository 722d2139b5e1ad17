"""Our policy: the cheapest route by the model calibrated on this GPU."""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, constants_matrix
from pkvsim.devices.route_options import as_read, asked, read_lens, serving_routes
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.decision import Decision
from pkvsim.pricing.constants import TILE
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.pricing.layer import price_variant, row_splits
from pkvsim.pricing.step_times import step_times
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens

INFINITE = float("inf")
HOST_ROUTES = ("split", "workqueue")  # whose splits the host chooses row by row


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What pricing needs of one shape, device and set of options, made once."""

    constants: np.ndarray  # [len(ROUTES), NUM_CONSTANTS]
    pinned: np.ndarray  # [len(ROUTES)] int64
    # num_kv_heads, query heads and tokens of each, head_dim, V's head_dim, element bytes, SMs
    head_args: tuple[int, int, int, int, float, int]
    reaches: np.ndarray  # [len(ROUTES)] int64: tokens at a row's end that the route reads, 0 for all
    prices_us: np.ndarray  # [len(ROUTES)] scratch: a layer's kernel time
    splits: np.ndarray  # [len(ROUTES)] scratch
    gpu_us: np.ndarray  # [len(ROUTES)] scratch: all layers
    host_us: np.ndarray  # [len(ROUTES)] scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedPolicy:
    """The cheapest available route by the closed form of what a step takes by the wall clock.

    split_splits, workqueue_splits: pinned splits of every row; None lets the model choose. Raises ValueError naming the
    argument.
    """

    name: ClassVar[str] = "calibrated"
    split_splits: int | None = None
    workqueue_splits: int | None = None
    _prepared: dict[tuple[DecodeShape, DeviceSpec, tuple[str, ...], AttentionOptions], Prepared] = field(
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
        ready = self._ready(shape, device, available, options)
        ready.splits[:] = ready.pinned
        self._price(shape, seq_lens, device, ready, options)
        return self._decision(shape, seq_lens, device, ready, layers, options)

    def _price(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, ready: Prepared, options: AttentionOptions
    ) -> None:
        """Fills ready.prices_us (kernel time of one layer) and ready.splits."""
        price_variant(seq_lens, *ready.head_args, ready.reaches, ready.constants, ready.prices_us, ready.splits)

    def _decision(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, ready: Prepared, layers: int,
        options: AttentionOptions,
    ) -> Decision:  # fmt: skip
        step_times(seq_lens, layers, ready.constants, ready.prices_us, ready.gpu_us, ready.host_us)
        host = ready.host_us.tolist()
        totals = [gpu + host_us for gpu, host_us in zip(ready.gpu_us.tolist(), host)]
        best = min(range(len(totals)), key=totals.__getitem__)
        route = ROUTES[best]
        splits = None
        if route in HOST_ROUTES:
            longest = int(ready.splits[best])
            splits = self.split_counts(route, shape, seq_lens, device, longest_splits=longest, options=options)
        prices = {name: us for name, us in zip(ROUTES, totals) if us != INFINITE}
        host_us, layer_us = dict(zip(ROUTES, host)), dict(zip(ROUTES, ready.prices_us.tolist()))
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
        ready = self._ready(shape, device, (route,), options)
        index = ROUTES.index(route)
        if longest_splits is None:
            ready.splits[:] = 0
            CalibratedPolicy._price(self, shape, seq_lens, device, ready, options)
            longest_splits = int(ready.splits[index])
        c = ready.constants[index]
        reads = read_lens(seq_lens, as_read(route, options).reach, int(c[TILE]))
        counts = np.empty(len(seq_lens), np.int64)
        row_splits(seq_lens, reads, shape.num_kv_heads, device.num_sms, c, longest_splits, counts)
        return counts

    def _ready(
        self, shape: DecodeShape, device: DeviceSpec, available: tuple[str, ...], options: AttentionOptions
    ) -> Prepared:
        ready = self._prepared.get((shape, device, available, options))
        return ready or self._prepare(shape, device, available, options)

    def _prepare(
        self, shape: DecodeShape, device: DeviceSpec, available: tuple[str, ...], options: AttentionOptions
    ) -> Prepared:
        unknown = [route for route in available if route not in ROUTES]
        if unknown or not available:
            raise ValueError(f"available: expected some of {', '.join(ROUTES)}, got {available!r}")
        serving = serving_routes(shape, options, available)
        if not serving:
            needs = ", ".join(asked(shape, options))
            raise ValueError(f"available: expected a route that serves {needs}, got {', '.join(available)}")
        constants = constants_matrix(device_routes(device), serving)
        if np.isnan(constants[:, 0]).all():
            got = ", ".join(serving)
            raise ValueError(f"available: expected a route that {device.name} has a model of, got {got}")
        pinned = np.zeros(len(ROUTES), np.int64)
        for route in HOST_ROUTES:
            pinned[ROUTES.index(route)] = self.pinned_splits(route) or 0
        ready = Prepared(
            constants=constants,
            pinned=pinned,
            head_args=(
                shape.num_kv_heads, options.query_shape(shape).group_size, shape.head_dim, options.value_dim(shape),
                options.kv_element_bytes(shape), device.num_sms,
            ),  # fmt: skip
            reaches=np.array([as_read(route, options).reach or 0 for route in ROUTES], np.int64),
            prices_us=np.empty(len(ROUTES)),
            splits=np.empty(len(ROUTES), np.int64),
            gpu_us=np.empty(len(ROUTES)),
            host_us=np.empty(len(ROUTES)),
        )
        self._prepared[shape, device, available, options] = ready
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
    margin = others[0][0] / prices[route] - 1
    listed = ", ".join(f"{name} {us:.0f} us{_host(host_us[name])}" for us, name in others)
    return f"{route} {prices[route]:.0f} us{_host(host_us[route])}, {margin:.0%} under the next for {step}: {listed}"


def _host(host_us: float) -> str:
    return f" ({host_us:.0f} on the host)" if host_us else ""
