"""Fits the prices of shared reads (pkvsim.pricing.shared) to measured steps."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.shared import PRICES, WARPGROUP_PRICES, SharedPrices
from pkvsim.schedule.costs import SharedCosts
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.shapes import DecodeShape
from pkvsim.timeline.shared import simulate_shared

STARTS = (PRICES, WARPGROUP_PRICES, SharedPrices(0.4, 100.0, 20.0, 0.5, 0.5, 1.0, 1.1))
STEP = 1e-3  # of the finite differences, relative: the timeline has kinks below


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredShared:
    """A step whose rows read together, and the kernel time of a layer."""

    name: str
    shape: DecodeShape
    seq_lens: np.ndarray  # [batch_size] int32
    groups: PrefixGroups
    us: float
    options: AttentionOptions = PLAIN
    costs: SharedCosts | None = None  # what the measured engine weighed; None: what it does by default

    def saved_tokens(self) -> int:
        """What SharingRule.worth asks for."""
        of_row, pages = self.groups.group_of_row, self.groups.prefix_pages
        members = np.bincount(of_row[of_row >= 0], minlength=len(pages))
        return int(((members - 1) * pages)[members > 1].sum()) * self.shape.page_size


@dataclass(frozen=True, slots=True)
class SharedFit:
    """Constants, and what they are worth."""

    prices: SharedPrices
    in_sample: float  # mean absolute relative error
    held_out: float  # the same of each half by a fit to the other half


def errors(measured: Sequence[MeasuredShared], device: DeviceSpec, prices: SharedPrices | None) -> np.ndarray:
    """Predicted over measured, less 1, of each: float64 [n]. prices: None for those that are shipped.

    Raises ValueError for a step in which no rows share.
    """
    found = []
    for step in measured:
        model = device.routes["balanced"]
        one = simulate_shared(
            model, step.shape, step.seq_lens, step.groups, device, options=step.options, prices=prices,
            costs=step.costs,
        )  # fmt: skip
        if one is None:
            raise ValueError(f"measured: expected steps whose rows read together, got {step.name}")
        found.append(one.timeline.makespan_us / step.us - 1)
    return np.array(found)


def fit(measured: Sequence[MeasuredShared], device: DeviceSpec) -> SharedPrices:
    """The constants of the least relative errors, outliers weighing less. device: with a calibrated balanced route."""

    def residuals(logs: np.ndarray) -> np.ndarray:
        return errors(measured, device, SharedPrices(*np.exp(logs).tolist()))

    best = min(
        (
            least_squares(
                residuals, np.log(np.maximum(1e-3, np.array(start))), diff_step=STEP, loss="soft_l1", f_scale=0.05,
                bounds=(-12.0, 6.0),
            )
            for start in STARTS
        ),
        key=lambda found: found.cost,
    )  # fmt: skip
    return SharedPrices(*np.exp(best.x).tolist())


def fit_shared(measured: Sequence[MeasuredShared], device: DeviceSpec, *, seed: int = 0) -> SharedFit:
    """Constants from all steps, and how well those from one random half predict the other."""
    order = np.random.default_rng(seed).permutation(len(measured))
    halves = [[measured[i] for i in half] for half in np.array_split(order, 2)]
    held_out = np.concatenate([errors(halves[1 - i], device, fit(halves[i], device)) for i in range(2)])
    prices = fit(measured, device)
    return SharedFit(
        prices, float(np.abs(errors(measured, device, prices)).mean()), float(np.abs(held_out).mean())
    )  # fmt: skip
