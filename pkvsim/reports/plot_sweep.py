"""A sweep as a picture: a heat map of one figure, or a map of the routes that the policy takes."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pkvsim.reports.plots import ROUTE_COLOURS, picture, plain_log, thin_grid, unit_of
from pkvsim.studies.sweep import Sweep

LABELLED_CELLS = 200  # A map of more cells has no numbers written into them.
NO_ROUTE = "none"  # of a step that no route serves
DARK_ROUTES = ("balanced", "workqueue", "flashinfer_tensor_core", "flashinfer")  # whose colour carries white text
LOG_RATIO = 20  # Colours are logarithmic where the largest value is this many times the smallest.


def check_axes(axes: Mapping[str, Sequence[Any]], *, option: str, trace: bool) -> None:
    """ValueError unless `option` ("plot" or "route_map") can draw a sweep over these axes, of a trace or of steps."""
    if option == "route_map" and (trace or len(axes) != 2):
        raise ValueError(f"route_map: expected two axes and no trace, got {', '.join(axes)}{' of a trace' * trace}")
    if len(axes) > 2:
        raise ValueError(f"plot: expected one or two axes, got {', '.join(axes)}")


def plot_sweep(sweep: Sweep, metric: str, path: str | Path, *, note: str = "") -> None:
    """One figure of every cell: a heat map over two axes, a line or bars over one; the note below. ValueError as
    pkvsim.reports.plots.picture, for an unknown metric, or for more than two axes."""
    check_axes(sweep.axes, option="plot", trace=False)
    values = sweep.values(metric)
    if values.ndim == 1:
        _line(sweep, metric, values, path, note)
        return
    width, height = _size(values.shape)
    with picture(path, note=note, width=width, height=height) as figure:
        from matplotlib.colors import LogNorm, Normalize

        axes = figure.subplots()
        known = values[~np.isnan(values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        logarithmic = low > 0 and high > LOG_RATIO * low
        norm = (LogNorm if logarithmic else Normalize)(low, high if high > low else low + 1)
        image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", norm=norm, aspect="auto")
        bar = figure.colorbar(image, label=unit_of(metric), pad=0.02)
        if logarithmic:
            plain_log(bar.ax.yaxis)
        _places(axes, sweep)
        for (row, column), value in np.ndenumerate(values):
            if values.size <= LABELLED_CELLS and not np.isnan(value):
                ink = "black" if norm(value) > 0.55 else "white"
                axes.text(column, row, _short(value), ha="center", va="center", color=ink, fontsize=8)


def plot_routes(sweep: Sweep, path: str | Path, *, note: str = "") -> None:
    """The route taken at every cell of a step sweep over two axes, and how much longer the next best takes. ValueError
    as pkvsim.reports.plots.picture, for other than two axes, or for a sweep of a trace, whose cells take many
    routes."""
    check_axes(sweep.axes, option="route_map", trace=not any("route" in cell for cell in sweep.cells))
    shape = [len(values) for values in sweep.axes.values()]
    routes = [cell.get("route", NO_ROUTE) for cell in sweep.cells]
    # The paper's FlashInfer is of no backend.
    colours = ROUTE_COLOURS | {"flashinfer": ROUTE_COLOURS["flashinfer_tensor_core"], NO_ROUTE: "#dddddd"}
    taken = [name for name in colours if name in routes]
    width, height = _size(shape)
    with picture(path, option="route_map", note=note, width=width + 2, height=height) as figure:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        axes = figure.subplots()
        places = np.array([taken.index(route) for route in routes]).reshape(shape)
        colour_map = ListedColormap([colours[name] for name in taken])
        axes.imshow(places, cmap=colour_map, vmin=-0.5, vmax=len(taken) - 0.5, aspect="auto")
        _places(axes, sweep)
        axes.set_xticks(np.arange(-0.5, shape[1]), minor=True)
        axes.set_yticks(np.arange(-0.5, shape[0]), minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        if len(routes) <= LABELLED_CELLS:
            for at, cell in enumerate(sweep.cells):
                ink = "white" if routes[at] in DARK_ROUTES else "black"
                text = _margin(cell) if "route" in cell else ""
                axes.text(at % shape[1], at // shape[1], text, ha="center", va="center", color=ink, fontsize=8)
        axes.set_title("route taken; numbers: how much longer the best other route takes")
        patches = [Patch(color=colours[name], label=f"{name} ({routes.count(name)})") for name in taken]
        figure.legend(handles=patches, loc="outside right upper", title="route (cells)", alignment="left")


def _size(shape: list[int] | tuple[int, ...]) -> tuple[float, float]:
    """Width and height of a picture of that many rows and columns, in inches."""
    rows, columns = shape
    return min(14.0, 2.6 + 0.75 * max(columns, 4)), min(11.0, 2.1 + 0.42 * max(rows, 4))


def _places(axes, sweep: Sweep) -> None:
    (row_name, rows), (column_name, columns) = sweep.axes.items()
    axes.set_xticks(range(len(columns)), [_tick(value) for value in columns])
    axes.set_yticks(range(len(rows)), [_tick(value) for value in rows])
    axes.set(xlabel=_axis(column_name), ylabel=_axis(row_name))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _line(sweep: Sweep, metric: str, values: np.ndarray, path: str | Path, note: str) -> None:
    ((name, places),) = sweep.axes.items()
    with picture(path, note=note, width=6.4, height=4) as figure:
        axes = figure.subplots()
        known = values[~np.isnan(values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        if isinstance(places[0], str):
            axes.bar([str(place) for place in places], values, color="#0072B2", width=0.6)
        else:
            order = np.argsort(places)
            axes.plot(np.array(places)[order], values[order], color="#0072B2", marker="o")
            axes.set_xscale("log" if max(places) > LOG_RATIO * min(places) else "linear")
            axes.set_xticks(np.array(places)[order], [_tick(place) for place in sorted(places)])
            axes.minorticks_off()
        if low > 0 and high > LOG_RATIO * low and not isinstance(places[0], str):
            axes.set_yscale("log")
            plain_log(axes.yaxis)
        else:
            axes.set_ylim(bottom=min(0.0, low))
        axes.set(xlabel=_axis(name), ylabel=unit_of(metric))
        thin_grid(axes)


def _axis(name: str) -> str:
    units = {"batch": "batch size, rows", "length": "length of every row, tokens", "page_size": "page size, tokens"}
    units |= {"rate": "arrival rate, times the trace's", "max_batch": "most running requests"}
    return units.get(name, name.replace("_", " "))


def _tick(value: object) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _margin(cell: dict) -> str:
    """What the best other route takes over the one taken, in percent; negative where the policy misses the best."""
    others = [us for name, us in cell["routes_us"].items() if name != cell["route"]]
    return f"{min(others) / cell['us'] - 1:+.0%}" if others else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
