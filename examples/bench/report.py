"""What bench_decode prints: the one table and the summary, from a list of results."""
from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from bench.measure import OUR_ROUTES, Result
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class CellSummary:
    """Ours against the limit and against FlashInfer's best in one cell."""

    case: str
    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    ragged: bool
    over_limit: float
    speed_up: float | None  # None when no FlashInfer backend ran


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else math.nan


def _cells(results: list[Result]) -> list[list[Result]]:
    cells: dict[tuple, list[Result]] = {}
    for result in results:
        key = (result.num_q_heads, result.num_kv_heads, result.case, result.batch_size, result.ragged)
        cells.setdefault(key, []).append(result)
    return list(cells.values())


def best_flashinfer_us(cell: list[Result]) -> float | None:
    times = [r.kernel_us for r in cell if r.route not in OUR_ROUTES and r.kernel_us is not None]
    return min(times) if times else None


def summarise(results: list[Result], route: str) -> list[CellSummary]:
    summaries = []
    for cell in _cells(results):
        ours = next((r for r in cell if r.route == route and r.kernel_us is not None), None)
        if ours is None:
            continue
        best = best_flashinfer_us(cell)
        summaries.append(CellSummary(case=ours.case, batch_size=ours.batch_size, num_q_heads=ours.num_q_heads,
                                     num_kv_heads=ours.num_kv_heads, ragged=ours.ragged,
                                     over_limit=ours.kernel_us / ours.limit_us,
                                     speed_up=None if best is None else best / ours.kernel_us))
    return summaries


def print_table(console: Console, results: list[Result]) -> None:
    table = Table(title="decode attention, cold L2, kernel time in a CUDA graph")
    for name in ("case", "batch", "kv_heads", "route", "us", "GB/s", "x limit", "x FlashInfer"):
        table.add_column(name, justify="left" if name in ("case", "route") else "right", no_wrap=True)
    for cell in _cells(results):
        best = best_flashinfer_us(cell)
        table.add_row(cell[0].case, str(cell[0].batch_size), str(cell[0].num_kv_heads), "stream limit",
                      f"{cell[0].limit_us:.2f}", f"{cell[0].kv_bytes / cell[0].limit_us / 1e3:.0f}", "1.00", "",
                      style="dim")
        for r in cell:
            head = (r.case, str(r.batch_size), str(r.num_kv_heads), r.route)
            if r.kernel_us is None:
                table.add_row(*head, "-", "-", "-", r.note[:40], style="dim")
                continue
            speed_up = "" if best is None else f"{best / r.kernel_us:.2f}"
            table.add_row(*head, f"{r.kernel_us:.2f}", f"{r.kv_bytes / r.kernel_us / 1e3:.0f}",
                          f"{r.kernel_us / r.limit_us:.2f}", speed_up,
                          style="bold" if r.route in OUR_ROUTES else "")
        table.add_section()
    console.print(table)


def overheads(results: list[Result], route: str) -> dict[str, float | None]:
    """Median over the cells of wall time minus kernel time."""
    mine = [r for r in results if r.route == route and r.kernel_us is not None]
    found = {}
    for name in ("wall_eager_us", "wall_graph_us"):
        values = [getattr(r, name) - r.kernel_us for r in mine if getattr(r, name) is not None]
        found[name] = statistics.median(values) if values else None
    return found


def summary(results: list[Result]) -> dict[str, dict]:
    """Per route of ours, the figures that one run is judged by."""
    report: dict[str, dict] = {}
    for route in (name for name in OUR_ROUTES if any(r.route == name for r in results)):
        cells = summarise(results, route)
        if not cells:
            continue
        compared = [c for c in cells if c.speed_up is not None]
        ragged = [c for c in cells if c.ragged and c.batch_size >= 32]
        slowest = min(compared, key=lambda c: c.speed_up, default=None)
        worst = max(ragged, key=lambda c: c.over_limit, default=None)
        report[route] = {
            "cells": len(cells),
            "geomean_over_limit": geomean([c.over_limit for c in cells]),
            "geomean_speed_up": geomean([c.speed_up for c in compared]) if compared else None,
            "slowest_cell": slowest and f"{slowest.case} x {slowest.batch_size}",
            "slowest_speed_up": slowest and slowest.speed_up,
            "worst_ragged_cell": worst and f"{worst.case} x {worst.batch_size}",
            "worst_ragged_over_limit": worst and worst.over_limit,
        }
    for route in dict.fromkeys(r.route for r in results):
        found = overheads(results, route)
        if any(value is not None for value in found.values()):
            report.setdefault(route, {}).update({f"{name}_minus_kernel": value for name, value in found.items()})
    return report


def print_summary(console: Console, results: list[Result]) -> None:
    for route, figures in summary(results).items():
        line = []
        if "cells" in figures:
            line.append(f"{figures['cells']} cells, geomean {figures['geomean_over_limit']:.3f} x the limit")
            if figures["geomean_speed_up"] is not None:
                line.append(f"{figures['geomean_speed_up']:.3f} x the best FlashInfer backend of each cell, slowest "
                            f"{figures['slowest_speed_up']:.3f} ({figures['slowest_cell']})")
            if figures["worst_ragged_cell"]:
                line.append(f"worst ragged of batch >= 32: {figures['worst_ragged_over_limit']:.3f} x the limit "
                            f"({figures['worst_ragged_cell']})")
        eager = figures.get("wall_eager_us_minus_kernel")
        graph = figures.get("wall_graph_us_minus_kernel")
        if eager is not None:
            line.append(f"plan + run + synchronise minus kernel: {eager:.1f} us eager"
                        + (f", {graph:.1f} us in a captured graph" if graph is not None else ""))
        console.print(f"[bold]{route}[/]: " + "; ".join(line))
