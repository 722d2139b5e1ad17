"""Fits OutsideConstants to the kernel times of gpu.calibrate.outside; prices whole layers to be held against them."""
from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants, OutsideEntry
from pkvsim.devices.route_model import FitError
from pkvsim.fitting.outside_table import ALL_REDUCE, ATTENTION, ELEMENTWISE, HEAT, HOST, MATRIX, KernelTime
from pkvsim.models.model_spec import ModelSpec
from pkvsim.outside.communication import all_reduce_us
from pkvsim.outside.matrices import BITS16, FP8, Matrix, layer_matrices_us, matrix_us
from pkvsim.outside.step_costs import HEAT_SHARE

ENGINE = "pytorch"  # whose kernels were timed
WEIGHT_BYTES = {BITS16: 2.0, FP8: 1.0}
TILES = (16.0, 64.0, 128.0)
# PyTorch's small kernels of a layer, none of them fused: two norms, two sums, silu and its product, and eight of rope
# (four products, two sums, their concatenation and a copy of the queries).
SMALL_KERNELS = 14
# What they read and write, in hidden vectors of a token: norms 2 x 2, sums 2 x 3, the activation 5 MLP widths of 3.5;
# rope, over query and key heads of 1.25: 5 in its products, 3.75 in its sums, 2.5 in the concatenation, and 2 in the
# copy.
ELEMENTWISE_PASSES = 40.75
EAGER_LAUNCHES = SMALL_KERNELS + 6  # of a layer: four products, attention and append beside them
# Calls of a layer that keep the GPU busy before the median of three replays of four layers is taken: two of a first
# use, two whole replays, and half of the three.
CALLS_BEFORE = 2 + 2 * 4 + 1.5 * 4
LEAST_MATRICES = 8
ATTENTION_HEADS, ATTENTION_DIM = 32, 128  # of gpu.calibrate.outside_kernels
BAND_PERCENT = 10.0
NOT_ZERO = {"half_rate_tokens": 8.0, "wave_weight": 0.3, "attention_half_tokens": 64.0}  # where a fit begins
MOST = {"roofline_power": 20.0, "wave_weight": 1.0}


def fit_outside(
    device: DeviceSpec, times: Sequence[KernelTime], start: OutsideConstants, *, source: str, date: str
) -> DeviceSpec:
    """`device` with constants of PyTorch's kernels: what was timed is fitted, the rest stays as `start` has it.

    Products are timed on a GPU that was not busy; the sustained rate is theirs over the boost that the heat rows show.
    ValueError below LEAST_MATRICES products in 16 bits.
    """
    products = [t for t in times if t.kernel == MATRIX]
    if sum(t.kind == BITS16 for t in products) < LEAST_MATRICES:
        raise ValueError(f"outside: expected at least {LEAST_MATRICES} products in 16 bits, got {len(products)}")
    constants = start
    basis: dict[str, str] = {}
    for part in (_fit_matrices, _fit_attention, _fit_elementwise, _fit_host, _fit_all_reduce, _fit_heat):
        found = part(times, device, constants)
        rounded = {name: float(f"{value:.4g}") for name, value in found.items()}
        constants = replace(constants, **rounded)
        basis |= dict.fromkeys(found, "measured")
    cool = replace(
        constants,
        matrix_share=constants.matrix_share * constants.boost,
        fp8_share=constants.fp8_share * constants.boost,
    )
    off = np.array([abs(_matrix_us(t, device, cool) / t.us - 1) for t in products])
    entry = OutsideEntry(
        constants=constants, status="measured", source=source, date=date, basis=basis, band_percent=BAND_PERCENT,
        in_sample=FitError(
            measurements=len(off), median_percent=round(100 * float(np.median(off)), 2),
            mean_percent=round(100 * float(off.mean()), 2),
        ),
    )  # fmt: skip
    return replace(device, outside=device.outside | {ENGINE: entry})


def _matrix_us(time: KernelTime, device: DeviceSpec, constants: OutsideConstants) -> float:
    size = time.out_features * time.in_features * WEIGHT_BYTES[time.kind]
    matrix = Matrix(time.out_features, time.in_features, size, time.kind)
    return float(matrix_us(time.tokens, matrix, device, constants))


def _least(
    names: tuple[str, ...],
    start: OutsideConstants,
    price: Callable[[OutsideConstants], np.ndarray],
    measured: np.ndarray,
) -> dict[str, float]:
    """Values of these constants that price best, in the robust mean of logarithms."""
    from scipy.optimize import least_squares

    origin = np.array([getattr(start, name) or NOT_ZERO.get(name, 1.0) for name in names])
    lower = np.array([np.log(1 / x) if name == "roofline_power" else -4.0 for name, x in zip(names, origin)]) - 1e-9
    upper = np.array([np.log(MOST[name] / x) if name in MOST else 4.0 for name, x in zip(names, origin)])
    least = np.array([1.0 if name == "roofline_power" else 0.0 for name in names])

    def values(at: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.maximum(origin * np.exp(at), least).tolist()))

    def residuals(at: np.ndarray) -> np.ndarray:
        return np.log(price(replace(start, **values(at))) / measured)

    found = least_squares(residuals, np.zeros(len(names)), bounds=(lower, upper), loss="soft_l1", f_scale=0.1)
    return values(found.x)


def _fit_matrices(times: Sequence[KernelTime], device: DeviceSpec, start: OutsideConstants) -> dict[str, float]:
    wide = [t for t in times if t.kernel == MATRIX and t.kind == BITS16]
    measured = np.array([t.us for t in wide])
    names = ("matrix_share", "weight_share", "matrix_us", "half_rate_tokens", "wave_weight", "roofline_power")
    best: tuple[float, dict[str, float]] = (np.inf, {})
    for tile in TILES:
        base = replace(start, tile_tokens=tile)
        found = _least(names, base, lambda c: np.array([_matrix_us(t, device, c) for t in wide]), measured)
        priced = np.array([_matrix_us(t, device, replace(base, **found)) for t in wide])
        off = float(np.abs(np.log(priced / measured)).mean())
        if off < best[0]:
            best = off, found | {"tile_tokens": tile}
    narrow = [t for t in times if t.kernel == MATRIX and t.kind == FP8]
    if device.fp8_tflops and len(narrow) >= LEAST_MATRICES:
        base = replace(start, **best[1])
        measured = np.array([t.us for t in narrow])
        return best[1] | _least(
            ("fp8_share",), base, lambda c: np.array([_matrix_us(t, device, c) for t in narrow]), measured
        )
    return best[1]


def _fit_attention(times: Sequence[KernelTime], device: DeviceSpec, start: OutsideConstants) -> dict[str, float]:
    chosen = [t for t in times if t.kernel == ATTENTION]
    if len(chosen) < 4:
        return {}
    chunk = np.array([t.tokens for t in chosen], np.float64)
    past = np.array([t.past for t in chosen], np.float64)
    flops = 4 * ATTENTION_HEADS * ATTENTION_DIM * (chunk * past + chunk * (chunk + 1) / 2)

    def price(c: OutsideConstants) -> np.ndarray:
        rate = device.fp16_tflops * c.attention_share * 1e6 * chunk / (chunk + c.attention_half_tokens)
        return c.attention_us + flops / rate

    names = ("attention_share", "attention_us", "attention_half_tokens")
    return _least(names, start, price, np.array([t.us for t in chosen]))


def _fit_elementwise(times: Sequence[KernelTime], device: DeviceSpec, start: OutsideConstants) -> dict[str, float]:
    chosen = [t for t in times if t.kernel == ELEMENTWISE]
    if len(chosen) < 4:
        return {}
    moved = np.array([t.bytes for t in chosen], np.float64)

    def price(c: OutsideConstants) -> np.ndarray:
        return c.kernel_us + moved / (device.beta_gb_s * c.elementwise_share * 1e3)

    found = _least(("kernel_us", "elementwise_share"), start, price, np.array([t.us for t in chosen]))
    return found | {"small_kernels": float(SMALL_KERNELS), "elementwise_passes": ELEMENTWISE_PASSES}


def _fit_host(times: Sequence[KernelTime], device: DeviceSpec, start: OutsideConstants) -> dict[str, float]:
    """A graph's replay alone is no step: what the GPU waits for of a server's host stays as it was."""
    found = {t.kind: t.us for t in times if t.kernel == HOST}
    return {"eager_layer_us": EAGER_LAUNCHES * found["eager_launch"]} if "eager_launch" in found else {}


def _fit_all_reduce(times: Sequence[KernelTime], device: DeviceSpec, start: OutsideConstants) -> dict[str, float]:
    chosen = [t for t in times if t.kernel == ALL_REDUCE]
    if len(chosen) < 4:
        return {}
    names: tuple[str, ...] = ("all_reduce_us", "all_reduce_share")
    if len({t.tokens for t in chosen}) > 1:
        names += ("all_reduce_rank_us",)

    def price(c: OutsideConstants) -> np.ndarray:
        return np.array([float(all_reduce_us(t.bytes, t.tokens, device, c)) for t in chosen])

    return _least(names, start, price, np.array([t.us for t in chosen]))


def _fit_heat(times: Sequence[KernelTime], device: DeviceSpec, start: OutsideConstants) -> dict[str, float]:
    """The rate of the first calls over that of the last, and twice the busy time at which it is half way down; a first
    call may be slow for another reason."""
    chosen = sorted((t for t in times if t.kernel == HEAT), key=lambda t: t.past)
    if len(chosen) < 12:
        return {}
    us = np.array([t.us for t in chosen])
    first, last = float(np.median(us[: len(us) // 20 + 3])), float(np.median(us[-(len(us) // 4) :]))
    boost = max(1.0, last / first)
    shares = {"matrix_share": start.matrix_share / boost}
    if device.fp8_tflops:
        shares["fp8_share"] = start.fp8_share / boost
    if boost < 1.02:
        return {"boost": 1.0, "boost_ms": 0.0}
    half_way = max(t.past for t in chosen if t.us < (first + last) / 2)
    return {"boost": boost, "boost_ms": max(1.0, 2 * half_way / 1e3), **shares}


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """One row of a table of whole layers: rows that decode or one chunk, and times in us with and without attention."""

    tokens: int
    rows: int
    context: int
    chunk: int
    past: int
    layer_us: float
    attention_us: float


def read_layers(path: str | Path) -> list[MeasuredLayer]:
    """What gpu.calibrate.outside wrote beside its kernel times; ValueError naming the file."""
    found = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                rows, chunk = int(row["rows"]), int(row["chunk"])
                found.append(
                    MeasuredLayer(
                        rows or chunk, rows, int(row["context"]), chunk, int(row["past"]), float(row["layer_us"]),
                        float(row["attention_us"]),
                    )
                )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot read layers: {error}") from None
    return found


def price_layers(
    layers: Sequence[MeasuredLayer], model: ModelSpec, device: DeviceSpec, constants: OutsideConstants
) -> np.ndarray:
    """Time in us of each layer without its attention, as warm as timing it makes the GPU: float64 [layers]."""
    c = constants
    tokens = np.array([layer.tokens for layer in layers])
    warm, cool = (
        layer_matrices_us(tokens, model, model.layers[0], device, used)
        for used in (c, replace(c, matrix_share=c.matrix_share * c.boost))
    )
    heat = np.ones(len(layers))
    if c.boost_ms > 0:
        busy_ms = CALLS_BEFORE * np.array([layer.layer_us for layer in layers]) / 1e3
        heat = np.where(warm > HEAT_SHARE * cool, np.minimum(1.0, busy_ms / c.boost_ms), 0.0)
    moved = c.elementwise_passes * model.hidden_size * 2 * tokens / (device.beta_gb_s * c.elementwise_share * 1e3)
    return cool + (warm - cool) * heat + c.small_kernels * c.kernel_us + moved
