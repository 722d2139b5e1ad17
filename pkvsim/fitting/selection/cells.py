"""Measured steps over selected pages: the JSON of examples/bench_selection.py."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkvsim.selection.rules import Budget
from pkvsim.shapes import MAX_TOKENS, check_int

TIMES = ("select", "attend", "everything", "summarize_one_token")  # of a cell, by bench_selection's names
# Of cells that were measured by 8-bit summaries, too.
CODED_TIMES = ("select_8bit", "everything_8bit", "summarize_one_token_8bit")


@dataclass(frozen=True, slots=True)
class MeasuredSelection:
    """A step of equally long rows, and its times for a layer, microseconds by name."""

    rows: int
    length: int
    fraction: float
    times: dict[str, float]
    run_us: float | None  # host time of issuing a selecting launch

    @property
    def label(self) -> str:
        """As a fit names the cell."""
        return f"{self.rows} x {self.length} at {self.fraction:g}"


def read_selection_cells(path: str | Path) -> tuple[list[MeasuredSelection], str]:
    """The cells of a file of bench_selection --json, and where they come from: file, command, date, GPU and driver.
    Raises ValueError naming the file and what is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read measurements: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot read measurements: {error}") from None
    results = data.get("results") if isinstance(data, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"{path}: results: expected the cells of bench_selection --json, got {type(results).__name__}")
    about = data.get("environment")
    facts = [str(about[name]) for name in ("command", "date", "gpu", "driver") if name in about] if isinstance(
        about, dict) else []  # fmt: skip
    cells = [_cell(f"{path}: results[{at}]", result) for at, result in enumerate(results)]
    return cells, ", ".join([Path(path).name, *facts])


def _cell(where: str, result: Any) -> MeasuredSelection:
    if not isinstance(result, dict) or not isinstance(result.get("times"), dict):
        raise ValueError(f"{where}: expected an object with rows, length, fraction and times, got {result!r:.80}")
    try:
        rows = check_int("rows", result.get("rows"), 1, 1 << 16)
        length = check_int("length", result.get("length"), 1, MAX_TOKENS)
        fraction = Budget(_number("fraction", result.get("fraction"))).fraction
        names = (*TIMES, *(name for name in CODED_TIMES if name in result["times"]))
        times = {name: _number(f"times.{name}", result["times"].get(name)) for name in names}
        host = result.get("host_us") or {}
        run_us = None
        if isinstance(host, dict) and {"dense", "select and run"} <= set(host):
            both = _number("host_us.select and run", host["select and run"])
            run_us = max(0.0, both - _number("host_us.dense", host["dense"]))
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    return MeasuredSelection(rows, length, fraction, times, run_us)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    return float(value)
