"""Fits a route's constants to measured times: robust least squares on log time, over a few ways of cutting rows.

What a route does (its rule and CTA slots per SM) is searched exhaustively among candidates; the other constants
are found by scipy's trust-region least squares from the given start. A fit to a random half, judged on the other half,
says what the constants are worth on steps they never saw.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from pkvsim.devices.route_model import CalibratedRoute, FitError, RouteModel
from pkvsim.fitting.fit_steps import step_constants
from pkvsim.fitting.measurements import Measurement
from pkvsim.options import KV_ELEMENT_BYTES
from pkvsim.pricing.cuts import sorted_lengths
from pkvsim.pricing.prices import MeasuredSteps, price_steps

MIN_MEASUREMENTS = 4  # of a route; fewer fit nothing
ROBUST_SCALE = 0.05  # residuals of log time beyond this (5 %) lose weight
TINY = 1e-3  # the least value of a fitted constant, in its own unit
HALVES = 5  # random halves over which the held-out error is taken


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Measurements as the compiled loop takes them."""

    priced: MeasuredSteps
    kernel_us: np.ndarray  # [num_measurements] float64


def _flatten(measurements: Sequence[Measurement]) -> _Steps:
    owned = [(owner, step) for owner, m in enumerate(measurements) for step in m.steps]
    rows = [(owner, sorted_lengths(np.array(step, np.int64))) for owner, step in owned]
    shapes = [
        (m.shape.num_kv_heads, m.shape.group_size, m.shape.head_dim, m.shape.page_size, m.splits or 0, m.planned)
        for m in measurements
    ]
    priced = MeasuredSteps(
        lengths=np.concatenate([lens for _, lens in rows]),
        offsets=np.cumsum([0, *(len(lens) for _, lens in rows)]),
        owners=np.array([owner for owner, _ in rows]),
        shapes=np.array(shapes, np.int64),
    )
    return _Steps(priced, np.array([m.kernel_us for m in measurements]))


def predict_us(model: RouteModel, measurements: Sequence[Measurement], *, num_sms: int) -> np.ndarray:
    """Kernel time of every measurement by the closed form, float64 [len(measurements)]."""
    return _predict(model.to_row(), _flatten(measurements), num_sms)


def _predict(constants: np.ndarray, steps: _Steps, num_sms: int) -> np.ndarray:
    prices = np.empty(len(steps.kernel_us))
    price_steps(steps.priced, float(KV_ELEMENT_BYTES), num_sms, constants, prices)
    return prices


def fit_error(model: RouteModel, measurements: Sequence[Measurement], *, num_sms: int) -> FitError:
    """Absolute errors of the model in percent of the measured kernel times."""
    return _summary(_percent(model, measurements, num_sms))


def held_out_error(
    measurements: Sequence[Measurement], candidates: Sequence[RouteModel], free: Sequence[str], *, num_sms: int,
    seeds: Sequence[int] = range(HALVES),
) -> FitError:  # fmt: skip
    """Errors on one random half of a fit to the other, over one pair of halves for each seed."""
    errors = []
    for seed in seeds:
        train, test = halves(len(measurements), seed)
        model = fit_route([measurements[i] for i in train], candidates, free, num_sms=num_sms)
        errors.append(_percent(model, [measurements[i] for i in test], num_sms))
    return _summary(np.concatenate(errors))


def _percent(model: RouteModel, measurements: Sequence[Measurement], num_sms: int) -> np.ndarray:
    measured = np.array([m.kernel_us for m in measurements])
    return 100 * np.abs(predict_us(model, measurements, num_sms=num_sms) / measured - 1)


def _summary(percent: np.ndarray) -> FitError:
    return FitError(
        measurements=len(percent),
        median_percent=round(float(np.median(percent)), 2),
        mean_percent=round(float(np.mean(percent)), 2),
    )


def fit_route(
    measurements: Sequence[Measurement], candidates: Sequence[RouteModel], free: Sequence[str], *, num_sms: int
) -> RouteModel:
    """The candidate whose `free` constants, once fitted, come closest to the measured kernel times.

    measurements: of one route on one GPU. candidates: starts, each with its own rule and CTA slots. free: names of the
    constants to fit; the others keep the candidate's values. Raises ValueError where there is too little to fit.
    """
    if len(measurements) < MIN_MEASUREMENTS:
        raise ValueError(f"measurements: expected at least {MIN_MEASUREMENTS} of a route, got {len(measurements)}")
    steps = _flatten(measurements)
    fits = [_fit_candidate(start, free, steps, num_sms) for start in candidates]
    return min(fits, key=lambda fit: fit[0])[1]


def _fit_candidate(start: RouteModel, free: Sequence[str], steps: _Steps, num_sms: int) -> tuple[float, RouteModel]:
    """(robust loss, model); the logarithm of a constant is what moves, so that all stay positive."""
    log_measured = np.log(steps.kernel_us)
    begin = np.log([max(TINY, getattr(start, name)) for name in free])
    if not np.isfinite(begin).all():
        raise ValueError(f"free: expected constants with a limit to start from, got {', '.join(free)} of {start}")

    def model_of(logs: np.ndarray) -> RouteModel:
        constants: dict[str, Any] = {name: float(f"{value:.4g}") for name, value in zip(free, np.exp(logs))}
        return replace(start, **constants)

    names = list(start.__dataclass_fields__)
    columns = [names.index(name) for name in free]
    row = start.to_row()

    def residuals(logs: np.ndarray) -> np.ndarray:
        row[columns] = np.exp(logs)
        return np.log(_predict(row, steps, num_sms)) - log_measured

    span = np.log(1e3)
    best = least_squares(
        residuals, begin, bounds=(begin - span, begin + span), loss="soft_l1", f_scale=ROBUST_SCALE, x_scale=0.3,
        diff_step=1e-4,
        max_nfev=200,
    )  # fmt: skip
    return float(best.cost), model_of(best.x)


def halves(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random half of range(count) and the rest, the same for the same seed."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def calibrate(
    measurements: Sequence[Measurement], candidates: Sequence[RouteModel], free: Sequence[str], *, num_sms: int,
    source: str, date: str,
) -> CalibratedRoute:  # fmt: skip
    """fit_route on all measurements, with its error on them and that of halves' fits on the other halves."""
    model = fit_route(measurements, candidates, free, num_sms=num_sms)
    model = replace(model, **step_constants(measurements, by_length=model.rule == "buckets"))
    held_out = None
    if len(measurements) >= 2 * MIN_MEASUREMENTS:
        held_out = held_out_error(measurements, candidates, free, num_sms=num_sms)
    return CalibratedRoute(
        model=model,
        status="calibrated",
        source=source,
        date=date,
        in_sample=fit_error(model, measurements, num_sms=num_sms),
        held_out=held_out,
    )
