"""A step's tasks on their CTA slots, a panel a route."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pkvsim.reports.plots import picture
from pkvsim.reports.table_serving import digits
from pkvsim.serving.costs import fit_note
from pkvsim.studies.step_report import RouteStep, StepReport

MAX_SVG_TASKS = 5000  # A panel with more tasks is drawn as pixels inside the SVG.
FEW_LENGTHS = 6
READ_COLOUR = "#d62728"  # of tasks that read for several rows; no length has it
OUTLINED_SLOTS = 64  # Bars are outlined where no more lie above each other.


def plot_step(report: StepReport, path: str | Path, *, ranks: Sequence[StepReport] = ()) -> None:
    """Draws every route's timeline to a .png or .svg file, on one scale of time. ranks: those of the GPUs that share
    the step, which are drawn in its place. ValueError as plots.picture."""
    drawn = [(one, route, f"GPU {number}, " if ranks else "") for number, one in enumerate(ranks or (report,))
             for route in one.routes]
    rows = len(drawn)
    note = f"attention prices of {report.device.name}: {fit_note(report.device)}"
    with picture(path, width=10, height=1.3 + 1.75 * rows, note=note) as figure:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, LogNorm

        lens = np.concatenate([one.seq_lens for one in ranks or (report,)])
        lens = lens[lens > 0]
        low, high = (float(lens.min()), float(lens.max())) if len(lens) else (1.0, 1.0)
        # The palest yellow would not show on white.
        scale = ListedColormap(colormaps["viridis_r"](np.linspace(0.1, 1, 256)))
        colours = ScalarMappable(LogNorm(low, high if high > low else low * 1.01), scale)
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        end_us = max(route.timeline_us for _, route, _ in drawn)
        for axes, (one, route, where) in zip(panels, drawn):
            _draw(axes, one, route, colours, where)
            axes.set_xlim(0, end_us * 1.01)
        panels[-1].set_xlabel("time of one layer, us (black line: its end, merges included)")
        count = int((report.seq_lens > 0).sum())
        words = f"{count:,} row{'s' * (count != 1)}, {int(report.seq_lens.sum()):,} tokens"
        devices = f"{len(ranks)} x {report.device.label}" if ranks else report.device.label
        figure.suptitle(f"{devices}: {words}", fontsize=11, x=0.01, horizontalalignment="left")
        if high > low:
            bar = figure.colorbar(colours, ax=list(panels), aspect=40, pad=0.01)
            bar.set_label("length of the task's row, tokens")
            ticks = _ticks(lens, low, high)
            bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
            bar.minorticks_off()


def _ticks(lens: np.ndarray, low: float, high: float) -> list[int]:
    """The lengths themselves where they are few and apart, otherwise round numbers over their range."""
    lengths = np.unique(lens)
    if len(lengths) <= FEW_LENGTHS and (np.diff(np.log(lengths)) > np.log(high / low) / 20).all():
        return lengths.tolist()
    inner = np.geomspace(low, high, 5)[1:-1]
    return sorted({int(low), int(high), *(int(float(f"{tick:.1e}")) for tick in inner)})


def _draw(axes, report: StepReport, route: RouteStep, colours, where: str) -> None:
    from matplotlib.collections import PolyCollection

    line = route.timeline
    left, right, low = line.start_us, line.end_us, line.slot.astype(float)
    across, up = np.stack((left, left, right, right), 1), np.stack((low, low + 1, low + 1, low), 1)
    corners = np.stack((across, up), 2)  # [num_tasks, 4, 2]
    lengths = report.seq_lens[line.schedule.tasks["row"]]
    colour = colours.to_rgba(np.maximum(lengths, 1)) if len(lengths) else np.zeros((0, 4))  # [num_tasks, 4]
    shared = line.schedule.shared
    if shared is not None:
        from matplotlib.colors import to_rgba

        colour[shared.read_of_task >= 0] = to_rgba(READ_COLOUR)
    outlined = route.used_slots <= OUTLINED_SLOTS and len(corners) <= MAX_SVG_TASKS
    bars = PolyCollection(
        corners,
        facecolors=colour if len(colour) else "none",
        edgecolors="white" if outlined else "none",
        linewidths=0.35 if outlined else 0,
        antialiaseds=outlined,
        rasterized=len(corners) > MAX_SVG_TASKS,
    )
    axes.add_collection(bars)
    axes.axvline(route.timeline_us, color="black", linewidth=0.9)
    used = max(1, route.used_slots)
    axes.set_ylim(used, 0)
    axes.set_yticks([0, used])
    axes.set_ylabel("CTA slot")
    name = f"{route.route} (taken)" if route.route == report.taken else route.route
    if shared is not None:
        name += ", red: read for several rows"
    slots = "" if used == line.num_slots else f"; {route.used_slots:,} of {line.num_slots:,} slots"
    axes.set_title(f"{where}{name}: {digits(route.timeline_us, 4)} us; {route.why()}{slots}", fontsize=9)
