"""Columns of a trace file, checked as a whole; a bad cell is named with its file, line and column."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from pkvsim.shapes import MAX_TOKENS
from pkvsim.traces.paper_files import INTEGER, csv_rows, json_rows, names

NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
DATETIME = re.compile(r"\s*((?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}[ T][0-9:]{8}(?:\.[0-9]{1,9})?)(?:Z|\+00:?00)?\s*")


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """n records of a file: text cells from CSV, values from JSON."""

    path: Path
    lines: Sequence[int]  # [n], where each record begins
    cells: dict[str, Sequence[Any]]  # by column, [n] each

    def error(self, name: str, index: int, expected: str, got: str | None = None) -> ValueError:
        """What is wrong with one cell, for the caller to raise."""
        shown = f"{ascii(self.cells[name][index]):.200}" if got is None else got
        return ValueError(f"{self.path}:{self.lines[index]}: column {name}: expected {expected}, got {shown}")

    def integers(self, name: str) -> np.ndarray:
        """A column of lengths in [0, MAX_TOKENS], int64 [n]."""
        expected = f"an integer in [0, {MAX_TOKENS}]"
        values = np.array(self._parse(name, _integer, expected), np.int64)
        self._refuse(name, (values < 0) | (values > MAX_TOKENS), expected)
        return values

    def numbers(self, name: str) -> np.ndarray:
        """A column of finite numbers >= 0, float64 [n]."""
        values = np.array(self._parse(name, _number, "a number >= 0"), np.float64)
        self._refuse(name, ~((values >= 0) & np.isfinite(values)), "a number >= 0")
        return values

    def datetimes_s(self, name: str) -> np.ndarray:
        """A column of dates and times (UTC or unnamed zone), seconds after the earliest, float64 [n]."""
        values = np.array(self._parse(name, _datetime, "YYYY-MM-DD HH:MM:SS[.fraction]"), "datetime64[ns]")
        return (values - values.min()).astype(np.int64) / 1e9

    def integer_lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of lists of 64-bit integers: all of them int64 [total], and where each begins int64 [n + 1]."""
        lists = self._parse(name, _integer_list, "a list of 64-bit integers")
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, lists), np.int64, len(lists)), out=offsets[1:])
        return np.fromiter(chain.from_iterable(lists), np.int64, int(offsets[-1])), offsets

    def _parse(self, name: str, parse: Callable[[Any], Any], expected: str) -> list[Any]:
        values = list(map(parse, self.cells[name]))
        if None in values:
            raise self.error(name, values.index(None), expected)
        return values

    def _refuse(self, name: str, bad: np.ndarray, expected: str) -> None:
        if bad.any():
            raise self.error(name, int(np.argmax(bad)), expected)


def _integer(cell: Any) -> int | None:
    if type(cell) is int:
        return cell if abs(cell) < 2**62 else None
    return int(cell) if isinstance(cell, str) and INTEGER.fullmatch(cell) else None


def _number(cell: Any) -> float | None:
    if type(cell) in (int, float):
        return float(cell) if -(2.0**1000) < cell < 2.0**1000 else None
    return float(cell) if isinstance(cell, str) and NUMBER.fullmatch(cell) else None


def _datetime(cell: Any) -> np.datetime64 | None:
    match = DATETIME.fullmatch(cell)
    try:
        return np.datetime64(match[1], "ns") if match else None
    except ValueError:  # no such day or hour
        return None


def _integer_list(cell: Any) -> list[int] | None:
    if not isinstance(cell, list):
        return None
    good = set(map(type, cell)) <= {int} and (not cell or -(2**63) <= min(cell) <= max(cell) < 2**63)
    return cell if good else None


def csv_columns(path: Path, text: str, wanted: Sequence[str], label: str) -> Columns:
    """The columns `wanted` (two or more) of a CSV file, which `label` names in the error for those it lacks."""
    rows = csv_rows(path, text)
    line, header = next(rows)
    _check_present(f"{path}:{line}", wanted, header, label)
    pick = itemgetter(*map(header.index, wanted))
    lines, cells = [], []
    for line, row in rows:
        lines.append(line)
        cells.extend(pick(row))
    return _columns(path, lines, wanted, cells)


def json_columns(path: Path, text: str, wanted: Sequence[str], label: str) -> Columns:
    """The same of JSON lines or an array of objects."""
    pick = itemgetter(*wanted)
    lines, cells = [], []
    for line, record in json_rows(path, text):
        try:
            cells.extend(pick(record))
        except KeyError:
            _check_present(f"{path}:{line}", wanted, record, label)
        lines.append(line)
    return _columns(path, lines, wanted, cells)


def _columns(path: Path, lines: list[int], wanted: Sequence[str], cells: list[Any]) -> Columns:
    """Columns of the records' wanted cells, record after record."""
    if not lines:
        raise ValueError(f"{path}: expected at least one request, got none")
    return Columns(path, lines, {name: cells[i :: len(wanted)] for i, name in enumerate(wanted)})


def _check_present(where: str, wanted: Sequence[str], found: Any, label: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{where}: column {names(missing)}: missing for the {label} format, found {names(found)}")
