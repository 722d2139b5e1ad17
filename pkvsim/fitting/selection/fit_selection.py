"""Fits the prices of selected pages to measured steps.

Selecting, attending to lists, both in one graph and the summaries of new tokens are each fitted to their own column,
by relative errors of which large ones weigh less. `held_out` is of fits that leave one cell out, on that cell.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.optimize import least_squares

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import FitError
from pkvsim.devices.selection_constants import SelectionConstants, SelectionEntry
from pkvsim.fitting.selection.cells import CODED_TIMES, TIMES, MeasuredSelection
from pkvsim.pricing.constants import BANDWIDTH
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.selected import list_rule, selected_us, selecting_us
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.setup import SelectionSetup
from pkvsim.selection.summaries import CODES
from pkvsim.shapes import DecodeShape

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)  # of bench_selection
START = SelectionConstants(
    select_us=9.0, score_share=0.9, coded_share=0.7, page_us=2e-3, attend_us=3.0, attend_share=0.97, gap_us=1.0,
    keep_us=2.5, keep_list_us=3e-3, keep_coded_us=0.5, run_us=27.0, list_us=5.0,
)  # fmt: skip
SHARES = ("score_share", "coded_share", "attend_share")
# Which constants each time tells, one after the other.
FITTED_TO = (
    ("select", ("select_us", "score_share", "page_us", "list_us")),
    ("attend", ("attend_us", "attend_share")),
    ("everything", ("gap_us",)),
    ("summarize_one_token", ("keep_us", "keep_list_us")),
    ("select_8bit", ("coded_share",)),
    ("summarize_one_token_8bit", ("keep_coded_us",)),
)
STEPS = ("select", "attend", "everything", "select_8bit", "everything_8bit")  # of which a fit's errors are told
LEAST_CELLS = 4


def predicted(cell: MeasuredSelection, device: DeviceSpec, constants: SelectionConstants) -> dict[str, float]:
    """The times of a cell by these constants, by the names of TIMES and CODED_TIMES. The bench pins the first page and
    the last two."""
    row, heads = device_routes(device)["balanced"].to_row(), heads_of(SHAPE, device.num_sms)
    lens, found = np.full(cell.rows, cell.length, np.int64), {}
    for suffix, summary_dtype in (("", None), ("_8bit", CODES)):
        setup = SelectionSetup(budget=Budget(cell.fraction, 0), pins=Pins(1, 2), summary_dtype=summary_dtype)
        us = selected_us(lens, heads, row, list_rule(setup), constants)
        found[f"select{suffix}"] = selecting_us(lens, heads, row[BANDWIDTH], setup.form, constants)
        found[f"everything{suffix}"] = us.select + us.attend
        found[f"summarize_one_token{suffix}"] = us.keep
    return found | {"attend": us.attend}


def errors(
    cells: Sequence[MeasuredSelection], device: DeviceSpec, constants: SelectionConstants, name: str
) -> np.ndarray:
    """Predicted over measured, less 1, of one of TIMES or CODED_TIMES: float64 [n] of the cells that have it."""
    return np.array([predicted(cell, device, constants)[name] / cell.times[name] - 1
                     for cell in cells if name in cell.times])  # fmt: skip


def fit(cells: Sequence[MeasuredSelection], device: DeviceSpec) -> SelectionConstants:
    """The constants of the least relative errors; those that no cell tells are START's. device: with a balanced route,
    whose speeds the shares are of."""
    found = START
    for column, names in FITTED_TO:
        if any(column in cell.times for cell in cells):
            found = _fitted(found, names, partial(errors, cells, device, name=column))
    runs = [cell.run_us for cell in cells if cell.run_us is not None]
    return found._replace(run_us=float(np.median(runs))) if runs else found


def _fitted(
    start: SelectionConstants, names: Sequence[str], residuals: Callable[[SelectionConstants], np.ndarray]
) -> SelectionConstants:
    """The best values of these constants, the others as they are; none is negative, and no share above 1.2."""

    def at(scales: np.ndarray) -> SelectionConstants:
        return start._replace(**{name: float(s * getattr(START, name)) for name, s in zip(names, scales)})

    most = [1.2 / getattr(START, name) if name in SHARES else 1e3 for name in names]
    least = [0.1 if name in SHARES else 0.0 for name in names]
    best = least_squares(
        lambda scales: residuals(at(scales)), np.ones(len(names)), bounds=(least, most), loss="soft_l1", f_scale=0.05,
        diff_step=1e-4,
    )  # fmt: skip
    return at(best.x)


def fit_selection(
    device: DeviceSpec, cells: Sequence[MeasuredSelection], *, source: str, date: str
) -> tuple[DeviceSpec, dict[str, np.ndarray]]:
    """The device with prices of selected pages, and their errors on cells that their fit has not seen, by the names of
    TIMES and CODED_TIMES: float64 [n] in the order of the cells that have them. Raises ValueError where there are too
    few."""
    if len(cells) < LEAST_CELLS:
        raise ValueError(f"selection: expected at least {LEAST_CELLS} cells, got {len(cells)}")
    constants = fit(cells, device)
    unseen: dict[str, list[float]] = {name: [] for name in (*TIMES, *CODED_TIMES)}
    for at, cell in enumerate(cells):
        others = fit([*cells[:at], *cells[at + 1 :]], device)
        for name in cell.times:
            unseen[name].append(float(errors([cell], device, others, name)[0]))
    entry = SelectionEntry(
        constants=SelectionConstants(*(float(f"{value:.4g}") for value in constants)), status="fitted", source=source,
        date=date, cells=tuple(cell.label for cell in cells),
        in_sample=_error(np.concatenate([errors(cells, device, constants, name) for name in STEPS])),
        held_out=_error(np.concatenate([unseen[name] for name in STEPS])),
    )  # fmt: skip
    return replace(device, selection=entry), {name: np.array(values) for name, values in unseen.items() if values}


def _error(found: np.ndarray) -> FitError:
    percent = np.abs(found) * 100
    return FitError(
        measurements=len(found), median_percent=round(float(np.median(percent)), 2),
        mean_percent=round(float(percent.mean()), 2),
    )  # fmt: skip
