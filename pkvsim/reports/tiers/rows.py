"""Rows of whatif's table about tiers of KV."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Cell = Callable[[dict[str, Any]], Any]  # a figure of a run's tiers


def tier_figures(summaries: Iterable[dict[str, Any]]) -> list[tuple[str, str, list[Any]]]:
    """(label, "seconds" or "percent", a figure of every run) of each row; none where no run has tiers."""
    tiers = [summary.get("tiers") for summary in summaries]
    known = next((one for one in tiers if one is not None), None)
    if known is None:
        return []
    rows: list[tuple[str, str, Cell]] = [
        (f"TTFT {part} {p}", "seconds", lambda one, part=part, p=p: one[f"ttft_{part}_s"][p])  # type: ignore[misc]
        for part in ("load", "compute") for p in ("p50", "p99")
    ]  # fmt: skip
    rows.append(("prompt tokens loaded", "percent", lambda one: one["loaded_share"]))
    for name in known["devices"]:
        rows += _device_rows(name)
    return [(label, kind, _each(tiers, cell)) for label, kind, cell in rows]


def _device_rows(name: str) -> list[tuple[str, str, Cell]]:
    blocked: list[tuple[str, str, Cell]] = [
        (f"blocked by {name} {p}", "seconds", lambda one, p=p: one["devices"][name]["blocked_s"][p])  # type: ignore
        for p in ("p50", "p99")
    ]
    return [*blocked, (f"{name} reads", "percent", lambda one: one["devices"][name]["busy_share"])]


def _each(tiers: Sequence[dict[str, Any] | None], cell: Cell) -> list[Any]:
    return [None if one is None else cell(one) for one in tiers]
