"""Fits the prices of shared reads (pkvsim.pricing.shared) to measured steps."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize

from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.shared import SharedPrices, read_prices, shared_costs_of
from pkvsim.schedule.costs import SharedCosts
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.shapes import DecodeShape
from pkvsim.timeline.shared import SharedTasks, run_shared, shared_tasks

STARTS = (
    SharedPrices(efficiency=0.3, weights=0.01, start=40.0, read=0.8, row=1.8, state=0.01, share=1.0),
    SharedPrices(efficiency=0.8, weights=300.0, start=15.0, read=2.5, row=0.7, state=4.0, share=0.5),
)
MOST = SharedPrices(efficiency=1.0, weights=1e3, start=400.0, read=400.0, row=400.0, state=400.0, share=1.0)
LEAST = 1e-5  # of each constant
STEP = 1e-3  # of the finite differences, relative: the timeline has kinks below
MOST_ERROR = 0.19  # held below a fifth, of every step, where the steps allow it
EXCESS_WEIGHT = 10.0  # of what the largest error is beyond that, against the mean error
MOST_STEPS = 30, 800  # of the first search from each start, of the second


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
    largest: float
    held_out: float  # mean, of each half by a fit to the other half


class _Measured:
    """Steps laid out once, for many prices."""

    def __init__(self, measured: Sequence[MeasuredShared], device: DeviceSpec) -> None:
        self.device, self.model = device, device.routes["balanced"]
        self.steps: list[tuple[MeasuredShared, SharedCosts, SharedTasks]] = []
        for step in measured:
            costs = step.costs or shared_costs_of(device, step.shape, len(step.seq_lens), step.options)
            tasks = shared_tasks(self.model, step.shape, step.seq_lens, step.groups, device, options=step.options,
                                 costs=costs)  # fmt: skip
            if tasks is None:
                raise ValueError(f"measured: expected steps whose rows read together, got {step.name}")
            self.steps.append((step, costs, tasks))

    def errors(self, prices: SharedPrices | None) -> np.ndarray:
        found = []
        for step, costs, tasks in self.steps:
            reads = read_prices(self.model, self.device, step.shape, step.options, costs, prices)
            found.append(run_shared(tasks, self.model, reads).makespan_us / step.us - 1)
        return np.array(found)


def errors(measured: Sequence[MeasuredShared], device: DeviceSpec, prices: SharedPrices | None) -> np.ndarray:
    """Predicted over measured, less 1, of each: float64 [n]. prices: None for those that are shipped.

    Raises ValueError for a step in which no rows share.
    """
    return _Measured(measured, device).errors(prices)


def fit(measured: Sequence[MeasuredShared], device: DeviceSpec) -> SharedPrices:
    """The constants of the least mean error whose largest is held below MOST_ERROR: searched for from those of the
    least squares, outliers weighing less. device: with a calibrated balanced route."""
    steps = _Measured(measured, device)

    def errors_at(logs: np.ndarray) -> np.ndarray:
        return steps.errors(SharedPrices(*np.exp(logs).tolist()))

    def bounded(logs: np.ndarray) -> float:
        found = np.abs(errors_at(logs))
        return float(found.mean() + EXCESS_WEIGHT * max(0.0, found.max() - MOST_ERROR))

    least, most = np.full(len(MOST), np.log(LEAST)), np.log(np.array(MOST))
    squares = [
        least_squares(
            errors_at, np.minimum(np.log(np.array(start)), most - STEP), diff_step=STEP, loss="soft_l1", f_scale=0.05,
            bounds=(least, most), max_nfev=MOST_STEPS[0],
        )
        for start in STARTS
    ]  # fmt: skip
    best = min(squares, key=lambda found: found.cost)
    found = minimize(
        bounded, best.x, method="Nelder-Mead", bounds=list(zip(least, most)),
        options={"adaptive": True, "maxfev": MOST_STEPS[1]},
    )  # fmt: skip
    return SharedPrices(*np.exp(found.x).tolist())


def fit_shared(measured: Sequence[MeasuredShared], device: DeviceSpec, *, seed: int = 0) -> SharedFit:
    """Constants from all steps, and how well those from one random half predict the other. A step that was measured
    several times, or by several plans, is in one half."""
    names = sorted({step.name for step in measured})
    first = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist())
    halves = [[step for step in measured if (step.name in first) == one] for one in (True, False)]
    held_out = np.concatenate([errors(halves[1 - i], device, fit(halves[i], device)) for i in range(2)])
    prices = fit(measured, device)
    found = np.abs(errors(measured, device, prices))
    return SharedFit(prices, float(found.mean()), float(found.max()), float(np.abs(held_out).mean()))
