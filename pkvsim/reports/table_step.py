"""A step on every route as tables on stdout."""
from __future__ import annotations

from rich.markup import escape

from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.reports.selection.lines import selection_lines
from pkvsim.serving.costs import fit_note
from pkvsim.studies.step_report import RouteStep, StepReport


def print_step(report: StepReport) -> None:
    """A line of figures a route, then a line a route that says what bounds it."""
    console = table_console()
    lens, shape = report.seq_lens, report.shape
    active = int((lens > 0).sum())
    distinct = "" if report.groups is None else f" ({report.distinct_bytes / 1e6:,.1f} MB distinct)"
    print_line(
        console,
        f"[bold]{escape(report.device.label)}[/]: {active:,} rows of {int(lens.sum()):,} tokens, "
        f"{useful_kv_bytes(shape, lens, report.options) / 1e6:,.1f} MB of KV a layer{distinct}; "
        f"{shape.num_q_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}",
        markup=True,
    )
    heads = (
        "closed\nus", "timeline\nus", "host\nus", f"{report.layers} layer{'s' * (report.layers > 1)}\nus",
        "splits", "launches", "tasks", "slots\nused", "busy", "longest\ntask us",
    )  # fmt: skip
    styles = ["bold" if route.route == report.taken else None for route in report.routes]
    columns = [Column("route", "left"), *(Column(head) for head in heads)]
    print_grid(console, columns, [_cells(route) for route in report.routes], styles=styles)
    for route in report.routes:
        print_line(console, f"{route.route}: {route.why()}")
    print_line(console, f"- taken: {report.reason}")
    estimated = [route.route for route in report.routes if route.status == "estimated"]
    note = f"; estimated: {', '.join(estimated)}" if estimated else ""
    if report.groups is not None:
        print_line(console, f"- {_sharing(report)}")
    if report.selection is not None:
        for line in selection_lines(report.selection):
            print_line(console, f"- {line}")
    print_line(console, f"- attention prices of {report.device.name}: {fit_note(report.device)}{note}")


def _sharing(report: StepReport) -> str:
    """Who reads together, and what the other routes' prices take for granted."""
    reads = [route.timeline.schedule.shared for route in report.routes if route.read_gb_s is not None]
    groups = len(report.groups.prefix_pages) if report.groups is not None else 0
    words = f"{groups} group{'s' * (groups != 1)} of rows with pages in common"
    if reads and reads[0] is not None:
        shared = reads[0]
        words += f": balanced reads them {len(shared.reads)} times a KV head for {len(shared.members)} rows"
    return f"{words}; routes that read rows apart find in L2 what another row has read, at twice the memory's speed"


def _cells(route: RouteStep) -> list[str]:
    low, high = route.splits
    return [
        route.route,
        f"{route.closed_us:,.1f}",
        f"{route.timeline_us:,.1f}",
        f"{route.host_us:,.1f}",
        f"{route.step_us:,.1f}",
        str(high) if low == high else f"{low}-{high}",
        str(route.launches),
        f"{len(route.timeline.schedule.tasks):,}",
        f"{route.used_slots:,}/{route.timeline.num_slots:,}",
        f"{route.busy_share:.0%}",
        f"{route.longest_task_us():,.1f}",
    ]
