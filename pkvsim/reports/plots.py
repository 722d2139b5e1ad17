"""What every picture shares: files, colours, axes. matplotlib is imported when one is drawn.

The pictures: plot_step (CTA timeline), plot_serving (a whatif), plot_sweep (heat and route maps), plot_trace.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pkvsim.devices.route_model import ROUTES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

TIME_UNITS = (("us", 1e6, 1e-3), ("ms", 1e3, 1.0), ("s", 1.0, 600.0), ("min", 1 / 60, 10_800.0))  # per s, below s
MANY_DECADES = 5e3  # From this ratio of highest to lowest value on, an axis is ticked at powers of ten alone.
SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which the colour-blind tell apart (their yellow is too pale for lines on white).
ROUTE_COLOURS = dict(zip(ROUTES, ("#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#009E73", "#0072B2")))
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D46", "#7F7F7F")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
PART_COLOURS = {"decode attention": "#0072B2", "rest of decode": "#BBBBBB", "prefill": "#E69F00"}
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "svg.hashsalt": "pkvsim",  # Without a fixed salt the same input would give another file.
    "svg.fonttype": "none",  # Text that stays text is smaller, and a search finds it.
}  # fmt: skip


def check_plot_path(path: str | Path, *, option: str = "plot") -> Path:
    """`path`, if a picture can be drawn there; ValueError naming the option otherwise. Long work asks before it
    starts."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{option}: expected a file ending in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    check_folder(path, option=option)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(f"{option}: needs matplotlib: pip install matplotlib") from None
    return path


def check_folder(path: str | Path, *, option: str) -> None:
    """ValueError naming the option where the file's folder is missing."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"{option}: cannot write {path}: no folder {Path(path).parent}")


@contextmanager
def picture(
    path: str | Path, *, width: float, height: float, option: str = "plot", note: str = ""
) -> Iterator[Figure]:
    """An empty figure of so many inches, the note below it, that is saved to `path` at the end. ValueError as
    check_plot_path."""
    path = check_plot_path(path, option=option)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        if note:
            figure.supxlabel(note, x=0.01, horizontalalignment="left", fontsize=8, color="#6A6A6A")
        yield figure
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ValueError(f"{option}: cannot write {path}: {error.strerror or error}") from None


def colour_of(index: int) -> str:
    """The colour of the index-th policy."""
    return PALETTE[index % len(PALETTE)]


def time_unit(longest_s: float) -> tuple[str, float]:
    """(unit, units per second) that suits times up to longest_s."""
    for unit, per_second, limit_s in TIME_UNITS:
        if longest_s < limit_s:
            return unit, per_second
    return "h", 1 / 3600


def unit_of(metric: str) -> str:
    """A figure's name with its unit, as an axis shows it: `ttft_s.p99` becomes `TTFT p99, s`."""
    name, _, part = metric.partition(".")
    words, unit = name, ""
    for suffix, text in (("_gb_s", "GB/s"), ("_per_s", "1/s"), ("_us", "us"), ("_s", "s")):
        if name.endswith(suffix):
            words, unit = name.removesuffix(suffix), text
            break
    if name == "us":
        words, unit = "step time", "us"
    words = " ".join(filter(None, (words.replace("_", " "), part.replace("_", " "))))
    for low in ("ttft", "tpot", "kv"):
        words = words.replace(low, low.upper())
    return f"{words}, {unit}" if unit else words


def plain_log(axis: Axis) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, or at 1 alone over many decades, written as numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < MANY_DECADES * low else (1,), numticks=16))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def thin_grid(axes: Axes, *, axis: str = "y") -> None:
    """Faint lines to read values by."""
    axes.grid(axis=axis, color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
