"""Fits what a step costs outside paged decode attention to the steps of gpu.serve on one GPU.

Every constant stays within what it can be: a product or an attention kernel computes and reads no faster than the GPU
does, and small kernels move no more than unfused ones would.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants, OutsideEntry
from pkvsim.devices.route_model import FitError
from pkvsim.fitting.fit_outside import ELEMENTWISE_PASSES
from pkvsim.fitting.fit_serving import LEAST_BAND
from pkvsim.models.presets import ModelSpec, get_model
from pkvsim.outside.derive import STAND_INS, outside_entry
from pkvsim.serving.server_config import ServingConfig
from pkvsim.studies.served.prices import price_served, served_attention_us
from pkvsim.studies.served.steps import ServedStep, measured_us, read_cells, read_served_steps

# What gpu.serve launches in a layer, counted: up to 8 tokens four products that have norms, sums and gate in them,
# beside rotation and append in one; beyond, two norms and a gate more (docs/serve.md).
LAUNCHES = {"few_tokens": 8.0, "few_share": 1.0, "few_kernels": 1.0, "small_kernels": 4.0}
# Least and most that a constant can be. Shares are of the GPU's own rate, and of the bandwidth that it was seen to
# reach.
BOUNDS = {
    "matrix_share": (0.2, 1.0), "weight_share": (0.3, 1.0), "matrix_us": (0.5, 20.0), "few_us": (0.1, 20.0),
    "few_token_us": (0.01, 5.0), "attention_share": (0.05, 1.0), "attention_us": (0.5, 50.0),
    "attention_half_tokens": (1.0, 1024.0), "kernel_us": (0.3, 20.0), "elementwise_passes": (8.0, ELEMENTWISE_PASSES),
    "step_us": (5.0, 2000.0), "row_us": (0.1, 50.0), "chunk_step_us": (10.0, 20_000.0),
    "chunk_layer_us": (10.0, 2000.0),
}  # fmt: skip
NOT_ZERO = {"few_us": 2.0, "few_token_us": 0.4, "chunk_layer_us": 300.0, "attention_half_tokens": 64.0}
MOST_WAKE = 10.0
FITTED_RUNS = "fitted on"  # how bench_serve.py names the loads that are served for a fit
LOSS_SCALE = 0.03  # relative error beyond which a step counts as an outlier
TOLERANCE = 1e-5  # relative change of the loss at which the fit ends; constants are rounded to four digits
MOST_ROUNDS = 40  # of the solver; some 20 are needed where the steps are a server's
PRIOR = 0.002  # weight of a constant's relative change, for those that the steps say nothing of


def fit_served(
    groups: Sequence[Sequence[ServedStep]], model: ModelSpec, device: DeviceSpec, config: ServingConfig, *,
    source: str, date: str,
) -> DeviceSpec:  # fmt: skip
    """The device with constants, under the name that the server's engine has there, that price these steps best.

    groups: steps in the order in which they ran, of one server each. All groups count alike, and in each of them decode
    steps and steps with chunks, whatever their number; steps far off count little. What they say nothing of stays near
    the kernels that stand in for the engine's where nobody fitted them. source, date: of the entry. ValueError where no
    step follows another.
    """
    from scipy.optimize import least_squares

    name = config.profile.constants
    start = outside_entry(device, STAND_INS.get(name, name))
    steps = [step for group in groups for step in group]
    weight, measured = _weights(groups), measured_us(steps)
    if not weight.any():
        raise ValueError("steps: expected some that follow others, got none")
    attention_us = served_attention_us(steps, model, device, config)
    base = replace(start.constants, **LAUNCHES)
    names = tuple(BOUNDS)
    least, most = np.array([BOUNDS[constant] for constant in names]).T
    origin = np.clip([getattr(base, constant) or NOT_ZERO.get(constant, 1.0) for constant in names], least, most)

    def constants(at: np.ndarray) -> OutsideConstants:
        return replace(base, **dict(zip(names, np.clip(origin * np.exp(at), least, most).tolist())))

    def with_constants(found: OutsideConstants) -> DeviceSpec:
        basis = {**start.basis, **dict.fromkeys(LAUNCHES, "measured"), **dict.fromkeys(names, "fitted")}
        entry = OutsideEntry(
            constants=found, status="fitted", source=source, date=date, basis=basis | {"few_share": "assumed"},
            band_percent=start.band_percent,
        )  # fmt: skip
        return replace(device, outside={**device.outside, name: entry})

    def residuals(at: np.ndarray) -> np.ndarray:
        off = np.log(price_served(steps, model, with_constants(constants(at)), config, attention_us) / measured)
        robust = np.sign(off) * LOSS_SCALE * np.sqrt(2 * (np.sqrt(1 + (off / LOSS_SCALE) ** 2) - 1))
        return np.concatenate([weight * robust, PRIOR * at])

    # The solver wants a start inside its bounds; values are cut to the bounds themselves.
    bounds = (np.log(least / origin) - 1e-9, np.log(most / origin) + 1e-9)
    at = least_squares(
        residuals, np.zeros(len(names)), diff_step=1e-3, bounds=bounds, ftol=TOLERANCE, xtol=10 * TOLERANCE,
        gtol=TOLERANCE / 10, max_nfev=MOST_ROUNDS,
    ).x  # fmt: skip
    fitted = constants(at)
    fitted = replace(fitted, **{constant: float(f"{getattr(fitted, constant):.4g}") for constant in names})
    found = with_constants(fitted)
    priced = price_served(steps, model, found, config, attention_us)
    entry, woken = found.outside[name], np.array([not step.follows for step in steps])
    if woken.any():  # the first step of a server that was idle, which its price multiplies
        factor = float(np.median(measured[woken] / priced[woken])) * fitted.wake_factor
        factor = float(f"{min(MOST_WAKE, max(1.0, factor)):.4g}")
        entry = replace(entry, constants=replace(fitted, wake_factor=factor),
                        basis={**entry.basis, "wake_factor": "fitted"})
        found = replace(device, outside={**device.outside, name: entry})
        priced = price_served(steps, model, found, config, attention_us)
    percent = 100 * np.abs(measured / priced - 1)
    entry = replace(entry, in_sample=_error(percent), band_percent=float(f"{np.percentile(percent, 90):.3g}"))
    return replace(found, outside={**found.outside, name: entry})


def hold_out(
    device: DeviceSpec, groups: Sequence[Sequence[ServedStep]], model: ModelSpec, config: ServingConfig
) -> DeviceSpec:
    """The device, whose constants were fitted to other steps, with their error on these ones and the band wide enough
    for nine in ten of each."""
    name = config.profile.constants
    entry = device.outside[name]
    percent = [
        100 * np.abs(measured_us(group) / price_served(group, model, device, config) - 1) for group in groups
    ]
    band = max(entry.band_percent, float(f"{np.percentile(np.concatenate(percent), 90):.3g}"))
    entry = replace(entry, held_out=_error(np.concatenate(percent)), band_percent=band)
    return replace(device, outside={**device.outside, name: entry})


def fit_files(paths: Sequence[str | Path], device: DeviceSpec, *, model: str | None, date: str) -> DeviceSpec:
    """The device with constants of engine pkv by files of examples/bench_serve.py, and their error on what was held
    out.

    Of steps (`--save-steps`, .npz) those of runs called "fitted on ..." are fitted, the others held out; of cells
    (`--json`) every third is held out, from the second. model: whose steps they are; None: the one that a file of cells
    names. The band is LEAST_BAND at least, as a device file serves models that nobody timed too. ValueError naming the
    file, or where no model or nothing to fit is left.
    """
    fitted: list[list[ServedStep]] = []
    held: list[list[ServedStep]] = []
    for path in paths:
        if str(path).endswith(".json"):
            named, cells = read_cells(path)
            model = model or named
            fitted.append([cell for at, cell in enumerate(cells) if at % 3 != 1])
            held.append(cells[1::3])
            continue
        runs = read_served_steps(path)
        fitted.append([step for name, run in runs.items() if name.startswith(FITTED_RUNS) for step in run])
        held += [run for name, run in runs.items() if not name.startswith(FITTED_RUNS)]
    if model is None:
        raise ValueError("model: expected the model whose steps they are, or a .json file that names it")
    spec, config = get_model(model), served_config([step for group in fitted + held for step in group])
    groups = [group for group in fitted if group]
    source = f"{sum(map(len, groups)):,} steps of gpu.serve on {spec.name} in " + ", ".join(Path(p).name for p in paths)
    found = fit_served(groups, spec, device, config, source=source, date=date)
    left = [group for group in held if group]
    if left:
        found = hold_out(found, left, spec, config)
    name = config.profile.constants
    entry = replace(found.outside[name], band_percent=max(LEAST_BAND, found.outside[name].band_percent))
    return replace(found, outside={**found.outside, name: entry})


def served_config(steps: Sequence[ServedStep]) -> ServingConfig:
    """gpu.serve with room for these steps."""
    return ServingConfig(
        max_batch=max((len(step.decode_lens) for step in steps), default=1),
        step_tokens=max((step.tokens for step in steps), default=1), shared_reads=False, steps_in_flight=2,
    )  # fmt: skip


def _weights(groups: Sequence[Sequence[ServedStep]]) -> np.ndarray:
    """float64 [steps of all groups], the squares of which add up to 1, or to 0 where no step counts."""
    found = []
    for group in groups:
        follows = np.array([step.follows for step in group], bool)
        chunked = np.array([len(step.chunk_begins) > 0 for step in group], bool)
        weight = np.zeros(len(group))
        for kind in (follows & chunked, follows & ~chunked):
            weight[kind] = 1 / np.sqrt(max(1, kind.sum()))
        found.append(weight / max(1e-12, float(np.linalg.norm(weight))))
    weight = np.concatenate(found) if found else np.zeros(0)
    return weight / max(1e-12, float(np.linalg.norm(weight)))


def _error(percent: np.ndarray) -> FitError:
    return FitError(measurements=len(percent), median_percent=float(f"{np.median(percent):.3g}"),
                    mean_percent=float(f"{percent.mean():.3g}"))
