"""The cells to which prices of selected pages were fitted, beside the prices."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.fitting.selection.cells import TIMES, MeasuredSelection
from pkvsim.fitting.selection.fit_selection import predicted
from pkvsim.reports.grid import Column, print_grid, print_line, table_console


def print_selection_fit(
    device: DeviceSpec, cells: Sequence[MeasuredSelection], unseen: Mapping[str, np.ndarray]
) -> None:
    """A line a cell: each time as measured, what the fit is off by, and what a fit is that has not seen the cell."""
    console, entry = table_console(), device.selection
    if entry is None:
        return
    heads = {"select": "select", "attend": "attend", "everything": "both", "summarize_one_token": "keep"}
    rows = []
    for at, cell in enumerate(cells):
        price = predicted(cell, device, entry.constants)
        off = [f"{cell.times[name]:,.1f} {price[name] / cell.times[name] - 1:+.1%} {unseen[name][at]:+.1%}"
               for name in TIMES]  # fmt: skip
        rows.append((cell.label, *off))
    columns = [Column("rows x tokens", "left"), *(Column(f"{heads[name]}\nus, off, unseen") for name in TIMES)]
    print_grid(
        console, columns, rows,
        title=f"{device.name}: selected pages; off: the fit's error; unseen: that of a fit without the cell",
    )  # fmt: skip
    for name, error in (("in sample", entry.in_sample), ("held out", entry.held_out)):
        if error is not None:
            percent = f"{error.median_percent:.1f} % in the median, {error.mean_percent:.1f} % in the mean"
            print_line(console, f"{name}: {percent} of {error.measurements} times of selecting, attending and both, "
                       "by summaries in 16 bits and in 8")  # fmt: skip
