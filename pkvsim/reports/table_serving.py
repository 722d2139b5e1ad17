"""Tables of simulated runs, on stdout."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape

from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.reports.tiers.rows import tier_figures
from pkvsim.studies.provenance import Basis
from pkvsim.studies.whatif import WhatIf


def print_whatif(report: WhatIf) -> None:
    """Every policy a column, and what a reader must know below."""
    console = table_console()
    trace, first = report.trace, next(iter(report.results.values()))
    print_line(
        console,
        f"[bold]{escape(report.model.name)}[/] on [bold]{escape(report.device.label)}[/], {escape(trace.name)}: "
        f"{len(trace):,} requests in {seconds(trace.duration_s)}, {int(trace.output_tokens.sum()):,} output tokens; "
        f"{first.num_pages:,} KV pages of {first.page_size} tokens",
        markup=True,
    )
    columns = [Column("", "left"), *(Column(name.replace("_", "\n")) for name in report.results)]
    print_grid(console, columns, [(label, *cells) for label, cells in table_rows(report)])
    for name, result in report.results.items():
        if result.summary["routes"]:
            print_line(console, f"routes of {name}: {_routes(result.summary)}")
    print_grid(console, BASIS_COLUMNS, basis_rows(report.basis), title="what the figures stand on:")
    for note in report.notes:
        print_line(console, f"- {note}")


def basis_rows(basis: Iterable[Basis]) -> list[tuple[str, ...]]:
    """(quantity, basis, share of the busy time, error or band) of each."""
    rows: list[tuple[str, ...]] = []
    for row in basis:
        error = "" if row.error_percent is None else f"{row.error_percent:.1f} %"
        if row.error_percent is None and row.band_percent is not None:
            error = f"within {row.band_percent:.0f} %"
        rows.append((row.quantity, row.basis, percent(row.time_share), error))
    return rows


def table_rows(report: WhatIf) -> list[tuple[str, list[str]]]:
    """(label, a cell for every policy) of each row that has a figure; a cell without one is a dash."""
    checks = [
        {} if check is None else {"timeline_regret": check.regret, "timeline_error": check.mean_error}
        for check in report.checks.values()
    ]
    figures = [result.summary | check for result, check in zip(report.results.values(), checks)]
    rows = [(label, [cell(figure) for figure in figures]) for label, cell in ROWS]
    written = {"seconds": seconds, "percent": percent}
    rows += [(label, [written[kind](value) for value in values]) for label, kind, values in tier_figures(figures)]
    return [(label, [text or "-" for text in cells]) for label, cells in rows if any(cells)]


def digits(value: float, count: int) -> str:
    """`count` significant digits; what is larger than they can say keeps all of its own, and has no power of ten."""
    text = f"{value:,.{count}g}"
    return f"{value:,.0f}" if "e+" in text else text


def seconds(value: float | None) -> str:
    """A time at three digits with its unit; empty for None."""
    if value is None:
        return ""
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (3 * 3600.0, 1 / 60, "min")):
        if float(f"{value:.3g}") < limit:  # as it is shown: 999.9 ms are 1 s
            return f"{value * scale:.3g} {unit}"
    return f"{value / 3600:,.1f} h"


def percent(value: float | None) -> str:
    """A share; empty for None."""
    return "" if value is None else f"{value:.1%}"


BASIS_COLUMNS = (Column("", "left"), Column("basis", "left"), Column("of the time"), Column("error"))


def _number(value: float | None) -> str:
    return "" if value is None else digits(value, 4)


def _shared(summary: dict[str, Any]) -> dict[str, Any]:
    """What shared reads gave; empty where there were none."""
    shared = summary.get("shared_reads") or {}
    return shared if shared.get("steps") else {}


def _selection(summary: dict[str, Any]) -> dict[str, Any]:
    """What selected pages gave; empty where there were none."""
    selection = summary.get("selection") or {}
    return selection if selection.get("steps") else {}


def _terabytes(value: float | None) -> str:
    return "" if value is None else f"{digits(value / 1e12, 3)} TB"


def _routes(summary: dict[str, Any]) -> str:
    total = sum(summary["routes"].values())
    parts = sorted(summary["routes"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count / total:.1%}" for name, count in parts)


ROWS = (
    ("tokens/s", lambda s: _number(s["tokens_per_s"])),
    ("time to serve all", lambda s: seconds(s["makespan_s"])),
    *((f"TTFT {p}", lambda s, p=p: seconds(s["ttft_s"][p])) for p in ("p50", "p90", "p99")),
    *((f"TPOT {p}", lambda s, p=p: seconds(s["tpot_s"][p])) for p in ("p50", "p90", "p99")),
    *((f"between tokens {p}", lambda s, p=p: seconds(s["itl_s"][p])) for p in ("p50", "p99")),
    *((f"end to end {p}", lambda s, p=p: seconds(s["e2e_s"][p])) for p in ("p50", "p99")),
    *((f"queue {p}", lambda s, p=p: seconds(s["queue_s"][p])) for p in ("p50", "p99")),
    ("GPU busy", lambda s: percent(s["busy_share"])),
    ("decode attention", lambda s: percent(s["attention_share"])),
    ("rest of decode", lambda s: percent(s["rest_share"])),
    ("prefill", lambda s: percent(s["prefill_share"])),
    ("regret to oracle", lambda s: percent(s["regret"])),
    ("  by tasks, sampled", lambda s: percent(s.get("timeline_regret"))),
    ("  prices off tasks", lambda s: percent(s.get("timeline_error"))),
    ("running requests", lambda s: _number(s["mean_rows"])),
    ("KV pages in use", lambda s: percent(s["kv_occupancy"])),
    ("prefix blocks hit", lambda s: percent(s["prefix_hit_share"])),
    ("steps with shared reads", lambda s: percent(_shared(s).get("step_share"))),
    ("  read by them", lambda s: _terabytes(_shared(s).get("read_bytes"))),
    ("  of pages read apart", lambda s: _terabytes(_shared(s).get("apart_bytes"))),
    ("  attention time saved", lambda s: percent(_shared(s).get("saved_share"))),
    ("steps over selected pages", lambda s: percent(_selection(s).get("step_share"))),
    ("  read over lists", lambda s: _terabytes(_selection(s).get("listed_bytes"))),
    ("  summaries scored", lambda s: _terabytes(_selection(s).get("scored_bytes"))),
    ("  of pages read dense", lambda s: _terabytes(_selection(s).get("whole_bytes"))),
    ("  attention time saved", lambda s: percent(_selection(s).get("saved_share"))),
    ("preemptions", lambda s: f"{s['preemptions']:,}"),
    ("rejected", lambda s: f"{s['rejected_too_long_for_pool'] + s['rejected_too_long_for_model']:,}"),
    ("saturated", lambda s: "yes" if s["saturated"] else "no"),
)
