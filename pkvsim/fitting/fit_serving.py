"""Fits what a step costs outside attention to published serving points, one engine on one GPU at a time.

Every constant stays within what it can be: nothing reads, computes or sends faster than the GPU does.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants, OutsideEntry
from pkvsim.devices.route_model import FitError
from pkvsim.fitting.serving_points import ServingPoint, price_points
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.engine_profile import get_profile

# What serving points can tell apart; the other constants stay as they were. The spread is how far, as a factor, a
# constant is expected to lie from its start, which keeps those that a table says little of near it.
SPREADS = {
    "weight_share": 1.15, "half_rate_tokens": 3.0, "matrix_us": 1.5, "narrow_us": 3.0, "roofline_power": 1.8,
    "attention_share": 1.5, "decode_share": 1.15, "kernel_us": 1.8, "step_us": 3.0, "row_us": 3.0,
    "chunk_step_us": 5.0, "all_reduce_us": 2.0, "all_reduce_rank_us": 3.0, "all_reduce_share": 1.5,
}  # fmt: skip
STREAM_SPREADS = {"token_us": 3.0, "token_place_us": 3.0}  # where one process hands on all tokens
# Least and most that a constant can be. Shares are of the GPU's own rates, and of the bandwidth that it was seen to
# reach.
BOUNDS = {
    "matrix_share": (0.2, 1.0), "fp8_share": (0.2, 1.0), "weight_share": (0.3, 1.0), "half_rate_tokens": (0.1, 1024.0),
    "matrix_us": (0.5, 20.0), "narrow_us": (0.1, 20.0), "roofline_power": (1.0, 10.0), "attention_share": (0.05, 1.0),
    "decode_share": (0.3, 1.0), "kernel_us": (0.3, 20.0), "step_us": (5.0, 2000.0), "row_us": (0.1, 50.0),
    "chunk_step_us": (10.0, 20_000.0), "all_reduce_us": (1.0, 100.0), "all_reduce_rank_us": (0.1, 20.0),
    "all_reduce_share": (0.1, 1.0), "token_us": (0.1, 1000.0), "token_place_us": (1e-4, 10.0),
}  # fmt: skip
RATE_SPREAD = 1.6  # of the share of the rate that the points' precision runs at
TTFT_WEIGHT = 1.0  # of a TTFT's error beside a TPOT's
PRIOR_WEIGHT = 0.05  # error that a constant one spread away from its start counts as, times the square root of points
LOSS_SCALE = 0.08  # error beyond which points count as outliers
LEAST_POINTS = 12
MOST_SPREADS = 3.0  # that a constant may lie from its start
LEAST_BAND, BAND_OF_MEAN = 10.0, 2.5  # percent; nine of ten errors lie within this many times their mean
NOT_ZERO = {
    "half_rate_tokens": 16.0, "narrow_us": 1.0, "chunk_step_us": 500.0, "step_us": 100.0, "row_us": 1.0,
    "token_us": 25.0, "token_place_us": 0.03,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PointErrors:
    """Absolute errors of points, in percent; TTFT over those that count alone, NaN where none does."""

    points: int
    tpot_median: float
    tpot_mean: float
    ttft_median: float


def errors(points: Sequence[ServingPoint], priced: np.ndarray) -> PointErrors:
    """priced: of price_points."""
    tpot = np.array([abs(p[1] / point.tpot_ms - 1) for p, point in zip(priced, points)])
    ttft = np.array([abs(p[0] / point.ttft_ms - 1) for p, point in zip(priced, points) if point.ttft_counts])
    return PointErrors(
        len(points), 100 * float(np.median(tpot)), 100 * float(tpot.mean()),
        100 * float(np.median(ttft)) if len(ttft) else float("nan"),
    )  # fmt: skip


def fit_constants(
    points: Sequence[ServingPoint],
    device: DeviceSpec,
    start: OutsideConstants,
    *,
    free: Sequence[str] | None = None,
) -> tuple[OutsideConstants, tuple[str, ...]]:
    """(constants that price these points best, names of those fitted). free: which may move, of SPREADS and the
    shares of the rates; all of them by default. ValueError below LEAST_POINTS points."""
    from scipy.optimize import least_squares

    if len(points) < LEAST_POINTS:
        raise ValueError(f"points: expected at least {LEAST_POINTS}, got {len(points)}")
    spreads = dict(SPREADS)
    if get_profile(points[0].engine).one_streamer:
        spreads |= STREAM_SPREADS
    spreads["fp8_share" if points[0].precision == "fp8" else "matrix_share"] = RATE_SPREAD
    if all(point.tensor_parallel == 1 for point in points):
        spreads = {name: spread for name, spread in spreads.items() if not name.startswith("all_reduce")}
    if free is not None:
        spreads = {name: spread for name, spread in spreads.items() if name in free}
    names = tuple(spreads)
    least, most = np.array([BOUNDS[name] for name in names]).T
    origin = np.clip([getattr(start, name) or NOT_ZERO[name] for name in names], least, most)
    scale = np.log(np.array([spreads[name] for name in names]))
    measured = np.array([(point.ttft_ms, point.tpot_ms) for point in points])
    counts = np.array([point.ttft_counts for point in points])

    def constants(at: np.ndarray) -> OutsideConstants:
        return replace(start, **dict(zip(names, np.clip(origin * np.exp(at * scale), least, most).tolist())))

    def residuals(at: np.ndarray) -> np.ndarray:
        off = np.log(price_points(points, device, constants(at)) / measured)
        off = np.concatenate([off[:, 1], TTFT_WEIGHT * off[counts, 0]])
        robust = np.sign(off) * LOSS_SCALE * np.sqrt(2 * (np.sqrt(1 + (off / LOSS_SCALE) ** 2) - 1))
        return np.concatenate([robust, PRIOR_WEIGHT * np.sqrt(len(points)) / np.sqrt(10) * at])

    # The solver wants a start inside its bounds; values are cut to the bounds themselves.
    bounds = (np.maximum(-MOST_SPREADS, np.log(least / origin) / scale - 1e-9),
              np.minimum(MOST_SPREADS, np.log(most / origin) / scale + 1e-9))  # fmt: skip
    found = least_squares(residuals, np.zeros(len(names)), diff_step=0.02, max_nfev=12, bounds=bounds)
    return _rounded(constants(found.x)), names


def _rounded(constants: OutsideConstants) -> OutsideConstants:
    values = {name: float(f"{getattr(constants, name):.4g}") for name in OutsideConstants.__dataclass_fields__}
    return replace(constants, **values)


def fit_serving(
    base: DeviceSpec,
    points: Sequence[ServingPoint],
    *,
    source: str,
    date: str,
    seed: int = 0,
    free: Sequence[str] | None = None,
) -> tuple[DeviceSpec, dict[str, PointErrors]]:
    """(base with constants outside attention for every engine of the points, errors on the half held out by engine).

    free: constants that may move, as in fit_constants.
    A fit to a random half gives the errors on the other; the constants that are kept are those of a fit to all. Points
    of other GPUs are left out. ValueError naming the argument where no engine has enough points.
    """
    fitted: dict[str, OutsideEntry] = {}
    held_out: dict[str, PointErrors] = {}
    engines = sorted({p.engine for p in points if p.device == base.name})
    for engine in engines:
        mine = [p for p in points if p.engine == engine and p.device == base.name]
        if len(mine) < 2 * LEAST_POINTS:
            continue
        before = outside_entry(base, engine)
        start = before.constants
        half = half_of(len(mine), seed)
        tried, _ = fit_constants([p for p, taken in zip(mine, half) if taken], base, start, free=free)
        others = [p for p, taken in zip(mine, half) if not taken]
        held_out[engine] = errors(others, price_points(others, base, tried))
        constants, names = fit_constants(mine, base, tried, free=free)
        found = errors(mine, price_points(mine, base, constants))
        fitted[engine] = OutsideEntry(
            constants=constants, status="fitted", source=f"{len(mine)} points of {source}", date=date,
            basis=before.basis | dict.fromkeys(names, "fitted"),
            band_percent=round(max(LEAST_BAND, BAND_OF_MEAN * held_out[engine].tpot_mean), 1),
            in_sample=_fit_error(found), held_out=_fit_error(held_out[engine]),
        )  # fmt: skip
    if not fitted:
        raise ValueError(f"serving: expected {2 * LEAST_POINTS} points of an engine on {base.name} at least")
    return replace(base, outside=base.outside | fitted), held_out


def half_of(count: int, seed: int) -> np.ndarray:
    """A random half: bool [count]."""
    taken = np.zeros(count, bool)
    taken[np.random.default_rng(seed).permutation(count)[: count // 2]] = True
    return taken


def _fit_error(found: PointErrors) -> FitError:
    return FitError(
        measurements=found.points, median_percent=round(found.tpot_median, 2), mean_percent=round(found.tpot_mean, 2)
    )
