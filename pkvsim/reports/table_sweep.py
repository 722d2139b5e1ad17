"""A sweep as a table on stdout: two axes make a heat map."""
from __future__ import annotations

import numpy as np
from rich.text import Text

from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.studies.sweep import Sweep

LESS_IS_BETTER = (
    "us", "routes_us", "ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s", "makespan_s", "step_us",
    "attention_us_per_decode_step", "regret", "preemptions", "rejected_too_long_for_pool",
    "rejected_too_long_for_model", "saturated",
)  # fmt: skip
GOOD, BAD = np.array([46, 125, 50]), np.array([183, 28, 28])  # RGB of the ends of the heat map


def print_sweep(sweep: Sweep, metric: str, notes: tuple[str, ...] = ()) -> None:
    """One figure of every cell; where steps were priced, a cell's route under it, if the figure is not another's."""
    console = table_console()
    values = sweep.values(metric)
    names = list(sweep.axes)
    with_route = not metric.startswith("routes_us.")
    shown = [_cell(value, cell, with_route=with_route) for value, cell in zip(values.ravel(), sweep.cells)]
    heat = _heat(values.ravel(), metric)
    print_line(console, f"[bold]{metric}[/] over {' and '.join(names)}", markup=True)
    figures = [Text(text, style=style) for text, style in zip(shown, heat)]
    if len(names) == 2:
        down, across = sweep.axes.values()
        columns = [Column(f"{names[0]} \\ {names[1]}", "left"), *(Column(str(value)) for value in across)]
        rows: list[tuple[str | Text, ...]] = [
            (str(value), *figures[at * len(across) : (at + 1) * len(across)]) for at, value in enumerate(down)
        ]
    else:
        columns = [Column(name) for name in (*names, metric)]
        rows = [
            (*(str(place[name]) for name in names), figure)
            for place, figure in zip(sweep.to_dict()["cells"], figures)
        ]
    print_grid(console, columns, rows)
    for note in notes:
        print_line(console, f"- {note}")


def _cell(value: float, cell: dict, *, with_route: bool) -> str:
    number = "-" if np.isnan(value) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{number}\n{cell['route'].replace('flashinfer_', '')}" if with_route and "route" in cell else number


def _heat(values: np.ndarray, metric: str) -> list[str]:
    """A background per value, on a logarithmic scale where all are positive."""
    known = ~np.isnan(values)
    scaled = np.log(np.where(known, values, 1)) if (values[known] > 0).all() else values
    low, high = (scaled[known].min(), scaled[known].max()) if known.any() else (0.0, 0.0)
    span = high - low
    styles = []
    for value, is_known in zip(scaled, known):
        share = (value - low) / span if is_known and span > 0 else 0.0
        if metric.split(".")[0] not in LESS_IS_BETTER:
            share = 1 - share
        red, green, blue = (GOOD + (BAD - GOOD) * (share if span > 0 else 0)).astype(int) if is_known else (0, 0, 0)
        styles.append(f"white on rgb({red},{green},{blue})" if is_known else "")
    return styles
