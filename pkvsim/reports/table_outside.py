"""Constants outside attention, and how well they meet what they were fitted to, as tables on stdout."""
from __future__ import annotations

from collections.abc import Mapping

from pkvsim.devices.device import DeviceSpec
from pkvsim.fitting.fit_serving import PointErrors
from pkvsim.reports.grid import Column, print_grid, table_console


def print_outside_fit(device: DeviceSpec, held_out: Mapping[str, PointErrors]) -> None:
    """A line an engine: errors of its constants, and those of a fit to a random half of its points on the other."""
    console = table_console()
    heads = ("status", "points or\ntimings", "median", "mean", "held-out TPOT\nmedian", "mean", "held-out TTFT\nmedian")
    rows = []
    for engine, entry in sorted(device.outside.items()):
        error, held = entry.in_sample, held_out.get(engine)
        known = ("", "", "")
        if error is not None:
            known = f"{error.measurements}", f"{error.median_percent:.1f}", f"{error.mean_percent:.1f}"
        left = ("", "", "")
        if held is not None:
            ttft = "" if held.ttft_median != held.ttft_median else f"{held.ttft_median:.1f}"
            left = (f"{held.tpot_median:.1f}", f"{held.tpot_mean:.1f}", ttft)
        rows.append((engine, entry.status, *known, *left))
    print_grid(
        console, [Column("engine", "left"), *(Column(head) for head in heads)], rows,
        title=f"{device.name}: absolute error in %",
    )  # fmt: skip
