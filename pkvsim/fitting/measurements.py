"""Measured step times: what one is, and the native CSV that `python -m gpu.calibrate` writes and `pkvsim fit` reads.

Columns: route, num_q_heads, num_kv_heads, head_dim, page_size, seq_lens (tokens, space-separated, `8192x64` for 64 rows
of 8192), splits (of every row, one number; empty where the route has none to pin), kernel_us (of one call among others,
back to back), plan_us (host time of planning), wall_us (plan, run and synchronise), event_us (the GPU's time of the
step alone) and run_us (host time of issuing it). The last four may be empty, and the last two columns missing.
"""
from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int

HEADER = (
    "route", "num_q_heads", "num_kv_heads", "head_dim", "page_size", "seq_lens", "splits", "kernel_us", "plan_us",
    "wall_us",
)  # fmt: skip
STEP_COLUMNS = ("event_us", "run_us")
MAX_ROWS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured time.

    seq_lens: tokens by row. kernel_us: of one call among others, the mean over seq_lens and other_steps where a trace
    was timed as a whole; with the host's planning in it where `planned` (events around whole steps see the gap).
    event_us, wall_us: of the step alone. device: whose GPU it ran on, in the table's own words; empty where the table
    is about one GPU.
    """

    route: str
    shape: DecodeShape
    seq_lens: tuple[int, ...]
    kernel_us: float
    splits: int | None = None
    plan_us: float | None = None
    wall_us: float | None = None
    event_us: float | None = None
    run_us: float | None = None
    device: str = ""
    planned: bool = False
    other_steps: tuple[tuple[int, ...], ...] = ()

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The lengths of every step that kernel_us is the mean of."""
        return self.seq_lens, *self.other_steps


Row = dict[str, str]


def read_table(
    path: str | Path, text: str, columns: Iterable[str], parse: Callable[[Row], list[Measurement]]
) -> list[Measurement]:
    """The measurements of a CSV, `parse` reading one row; ValueError naming file, line and what is wrong."""
    measurements: list[Measurement] = []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"expected the columns {', '.join(columns)}; missing: {', '.join(sorted(missing))}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"expected {len(reader.fieldnames or ())} cells")
            measurements += parse(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None
    if not measurements:
        raise ValueError(f"{path}: expected at least one measurement, got none")
    return measurements


@overload
def cell_time(row: Row, column: str, *, scale: float = ..., optional: Literal[False] = ...) -> float: ...


@overload
def cell_time(row: Row, column: str, *, scale: float = ..., optional: Literal[True]) -> float | None: ...


def cell_time(row: Row, column: str, *, scale: float = 1.0, optional: bool = False) -> float | None:
    """A time > 0 (>= 0 where it may be missing) of a cell, times `scale`; None for an empty optional cell."""
    text = row[column].strip()
    if optional and not text:
        return None
    try:
        value = float(text) * scale
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (optional and value == 0)):
        raise ValueError(f"column {column}: expected a time > 0, got {text!r}")
    return value


def cell_int(row: Row, column: str, *, low: int = 1) -> int:
    """An integer cell, at least `low`."""
    text = row[column].strip()
    return check_int(f"column {column}", int(text) if re.fullmatch(r"\d{1,18}", text) else text, low, MAX_TOKENS)


def format_seq_lens(seq_lens: Iterable[int]) -> str:
    """Lengths as the native table writes them: `8192x64 17`."""
    runs: list[list[int]] = []
    for length in seq_lens:
        if runs and runs[-1][0] == length:
            runs[-1][1] += 1
        else:
            runs.append([int(length), 1])
    return " ".join(str(length) if count == 1 else f"{length}x{count}" for length, count in runs)


def parse_seq_lens(text: str) -> tuple[int, ...]:
    """The reverse of format_seq_lens; ValueError for anything else."""
    lens: list[int] = []
    for word in text.split():
        match = re.fullmatch(r"(\d{1,10})(?:x(\d{1,7}))?", word)
        count = int(match[2] or 1) if match else 0
        if not match or not 0 < count <= MAX_ROWS - len(lens) or int(match[1]) > MAX_TOKENS:
            raise ValueError(f"column seq_lens: expected lengths such as 8192x64 17, got {word!r}")
        lens += [int(match[1])] * count
    if not any(lens):
        raise ValueError(f"column seq_lens: expected at least one length > 0, got {text!r}")
    return tuple(lens)


def parse_native(row: Row) -> list[Measurement]:
    """One row of the native table."""
    shape = DecodeShape(*(cell_int(row, name) for name in ("num_q_heads", "num_kv_heads", "head_dim", "page_size")))
    steps: dict[str, Any] = {name: cell_time(row, name, optional=True) for name in STEP_COLUMNS if name in row}
    return [
        Measurement(
            route=row["route"].strip(),
            shape=shape,
            seq_lens=parse_seq_lens(row["seq_lens"]),
            splits=cell_int(row, "splits") if row["splits"].strip() else None,
            kernel_us=cell_time(row, "kernel_us"),
            plan_us=cell_time(row, "plan_us", optional=True),
            wall_us=cell_time(row, "wall_us", optional=True),
            **steps,
        )
    ]


def write_measurements(path: str | Path, measurements: Iterable[Measurement]) -> None:
    """Writes the native table; measurements of whole traces have no place in it (ValueError)."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*HEADER, *STEP_COLUMNS))
        for m in measurements:
            if m.other_steps:
                raise ValueError("measurements: expected single steps, got the mean of a trace")
            all_us = (m.kernel_us, m.plan_us, m.wall_us, m.event_us, m.run_us)
            times = ["" if us is None else f"{us:.3f}" for us in all_us]
            shape = (m.shape.num_q_heads, m.shape.num_kv_heads, m.shape.head_dim, m.shape.page_size)
            splits = "" if m.splits is None else m.splits
            writer.writerow([m.route, *shape, format_seq_lens(m.seq_lens), splits, *times])
