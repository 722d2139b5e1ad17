"""Fits the prices of selected pages to measured steps, the JSON of examples/bench_selection.py.

Selecting, attending to lists, both in one graph and the summaries of new tokens are each fitted to their own column,
by relative errors of which large ones weigh less. `held_out` is of fits that leave one cell out, on that cell.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import FitError
from pkvsim.devices.selection_constants import SelectionConstants, SelectionEntry
from pkvsim.pricing.constants import BANDWIDTH
from pkvsim.pricing.layer import heads_of
from pkvsim.pricing.selected import list_rule, selected_us, selecting_us
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.setup import SelectionSetup
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)  # of bench_selection
START = SelectionConstants(
    select_us=9.0, score_share=0.9, page_us=2e-3, attend_us=3.0, attend_share=0.97, gap_us=1.0, keep_us=2.5,
    keep_list_us=3e-3, run_us=27.0,
)  # fmt: skip
SHARES = ("score_share", "attend_share")
# Which constants each time tells, one after the other.
FITTED_TO = (
    ("select", ("select_us", "score_share", "page_us")),
    ("attend", ("attend_us", "attend_share")),
    ("everything", ("gap_us",)),
    ("summarize_one_token", ("keep_us", "keep_list_us")),
)
TIMES = tuple(name for name, _ in FITTED_TO)
LEAST_CELLS = 4


@dataclass(frozen=True, slots=True)
class MeasuredSelection:
    """A step of equally long rows, and its times for a layer, microseconds by name."""

    rows: int
    length: int
    fraction: float
    times: dict[str, float]
    run_us: float | None  # host time of issuing a selecting launch

    @property
    def label(self) -> str:
        """As a fit names the cell."""
        return f"{self.rows} x {self.length} at {self.fraction:g}"


def read_selection_cells(path: str | Path) -> tuple[list[MeasuredSelection], str]:
    """The cells of a file of bench_selection --json, and where they come from: file, command, date, GPU and driver.
    Raises ValueError naming the file and what is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read measurements: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot read measurements: {error}") from None
    results = data.get("results") if isinstance(data, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"{path}: results: expected the cells of bench_selection --json, got {type(results).__name__}")
    about = data.get("environment")
    facts = [str(about[name]) for name in ("command", "date", "gpu", "driver") if name in about] if isinstance(
        about, dict) else []  # fmt: skip
    cells = [_cell(f"{path}: results[{at}]", result) for at, result in enumerate(results)]
    return cells, ", ".join([Path(path).name, *facts])


def _cell(where: str, result: Any) -> MeasuredSelection:
    if not isinstance(result, dict) or not isinstance(result.get("times"), dict):
        raise ValueError(f"{where}: expected an object with rows, length, fraction and times, got {result!r:.80}")
    try:
        rows = check_int("rows", result.get("rows"), 1, 1 << 16)
        length = check_int("length", result.get("length"), 1, MAX_TOKENS)
        fraction = Budget(_number("fraction", result.get("fraction"))).fraction
        times = {name: _number(f"times.{name}", result["times"].get(name)) for name in TIMES}
        host = result.get("host_us") or {}
        run_us = None
        if isinstance(host, dict) and {"dense", "select and run"} <= set(host):
            both = _number("host_us.select and run", host["select and run"])
            run_us = max(0.0, both - _number("host_us.dense", host["dense"]))
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    return MeasuredSelection(rows, length, fraction, times, run_us)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    return float(value)


def predicted(cell: MeasuredSelection, device: DeviceSpec, constants: SelectionConstants) -> dict[str, float]:
    """The times of a cell by these constants, by the names of TIMES. The bench pins the first page and the last two."""
    setup = SelectionSetup(budget=Budget(cell.fraction, 0), pins=Pins(1, 2))
    row, heads = device_routes(device)["balanced"].to_row(), heads_of(SHAPE, device.num_sms)
    lens = np.full(cell.rows, cell.length, np.int64)
    us = selected_us(lens, heads, row, list_rule(setup), constants)
    select = selecting_us(lens, heads, row[BANDWIDTH], constants)
    return {"select": select, "attend": us.attend, "everything": us.select + us.attend, "summarize_one_token": us.keep}


def errors(
    cells: Sequence[MeasuredSelection], device: DeviceSpec, constants: SelectionConstants, name: str
) -> np.ndarray:
    """Predicted over measured, less 1, of one of TIMES: float64 [n]."""
    return np.array([predicted(cell, device, constants)[name] / cell.times[name] - 1 for cell in cells])


def fit(cells: Sequence[MeasuredSelection], device: DeviceSpec) -> SelectionConstants:
    """The constants of the least relative errors. device: with a balanced route, whose speeds the shares are of."""
    found = START
    for column, names in FITTED_TO:
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
    TIMES: float64 [n] in the order of the cells. Raises ValueError where there are too few."""
    if len(cells) < LEAST_CELLS:
        raise ValueError(f"selection: expected at least {LEAST_CELLS} cells, got {len(cells)}")
    constants = fit(cells, device)
    unseen: dict[str, list[float]] = {name: [] for name in TIMES}
    for at, cell in enumerate(cells):
        others = fit([*cells[:at], *cells[at + 1 :]], device)
        for name in TIMES:
            unseen[name].append(float(errors([cell], device, others, name)[0]))
    steps = ("select", "attend", "everything")
    entry = SelectionEntry(
        constants=SelectionConstants(*(float(f"{value:.4g}") for value in constants)), status="fitted", source=source,
        date=date, cells=tuple(cell.label for cell in cells),
        in_sample=_error(np.concatenate([errors(cells, device, constants, name) for name in steps])),
        held_out=_error(np.concatenate([unseen[name] for name in steps])),
    )  # fmt: skip
    return replace(device, selection=entry), {name: np.array(values) for name, values in unseen.items()}


def _error(found: np.ndarray) -> FitError:
    percent = np.abs(found) * 100
    return FitError(
        measurements=len(found), median_percent=round(float(np.median(percent)), 2),
        mean_percent=round(float(percent.mean()), 2),
    )  # fmt: skip
