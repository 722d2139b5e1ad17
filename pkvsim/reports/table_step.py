"""A step on every route as tables on stdout."""
from __future__ import annotations

from rich.table import Table

from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.reports.table_serving import table_console
from pkvsim.serving.costs import fit_note
from pkvsim.studies.explain_step import RouteStep, StepReport


def print_step(report: StepReport) -> None:
    """A line of figures a route, then a line a route that says what bounds it."""
    console = table_console()
    lens, shape = report.seq_lens, report.shape
    active = int((lens > 0).sum())
    console.print(
        f"[bold]{report.device.label}[/]: {active:,} rows of {int(lens.sum()):,} tokens, "
        f"{useful_kv_bytes(shape, lens, report.options) / 1e6:,.1f} MB of KV a layer; {shape.num_q_heads} query and "
        f"{shape.num_kv_heads} KV heads of {shape.head_dim}",
        soft_wrap=True,
    )
    table = Table(show_edge=False)
    table.add_column("route", no_wrap=True)
    columns = (
        "closed\nus", "timeline\nus", "host\nus", f"{report.layers} layer{'s' * (report.layers > 1)}\nus",
        "splits", "launches", "tasks", "slots\nused", "busy", "longest\ntask us",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for route in report.routes:
        table.add_row(*_cells(route), style="bold" if route.route == report.taken else None)
    console.print(table)
    for route in report.routes:
        console.print(f"{route.route}: {route.why()}", markup=False, soft_wrap=True)
    console.print(f"- taken: {report.reason}", markup=False, soft_wrap=True)
    estimated = [route.route for route in report.routes if route.status == "estimated"]
    note = f"; estimated: {', '.join(estimated)}" if estimated else ""
    console.print(
        f"- attention prices of {report.device.name}: {fit_note(report.device)}{note}", markup=False, soft_wrap=True
    )


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
