"""Columns of a trace file's records, checked a chunk at a time; a bad cell is named with its file, line and column."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any

import numpy as np

from pkvsim.shapes import MAX_TOKENS

# ASCII: int() and float() refuse some of what \s takes for white space elsewhere.
INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}(\.0*)?\s*", re.ASCII)
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
DATETIME = re.compile(
    r"\s*((?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?) ?"
    r"(?:Z|UTC|([+-])([0-9]{2}):?([0-5][0-9])?)?\s*",
    re.ASCII,
)
ABSENT = None  # the cell of a column that a record does not have
BYTES_PER_TOKEN = 4  # an assumption for English text: https://platform.openai.com/tokenizer
MAX_HASH = 2**64  # exclusive; hashes are signed or unsigned 64-bit integers


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """n records of a file: text cells from CSV, values from JSON, ABSENT where a record has no such key."""

    file: str
    lines: Sequence[int]  # [n], where each record begins
    cells: Mapping[str, Sequence[Any]]  # by column, [n] each

    def error(self, name: str, index: int, expected: str, got: str | None = None) -> ValueError:
        """What is wrong with one cell, for the caller to raise."""
        cell = self.cells[name][index]
        shown = ("nothing" if cell is ABSENT else f"{ascii(cell):.200}") if got is None else got
        return ValueError(f"{self.file}:{self.lines[index]}: column {name}: expected {expected}, got {shown}")

    def integers(self, name: str) -> np.ndarray:
        """A column of lengths in [0, MAX_TOKENS], int64 [n]; 100.0 is 100."""
        expected = f"an integer in [0, {MAX_TOKENS}]"
        values = np.array(_digits(self.cells[name]) or self._parse(name, _integer, expected), np.int64)
        self._refuse(name, (values < 0) | (values > MAX_TOKENS), expected)
        return values

    def text_tokens(self, name: str) -> np.ndarray:
        """Tokens of a column of texts or chat messages at BYTES_PER_TOKEN, int64 [n]."""
        values = self._parse(name, _text_bytes, "text, or chat messages with text")
        return -(-np.array(values, np.int64) // BYTES_PER_TOKEN)

    def numbers(self, name: str) -> np.ndarray:
        """A column of finite numbers >= 0, float64 [n], NaN for ABSENT."""
        cells = self.cells[name]
        expected = "a number >= 0"
        if set(map(type, cells)) == {type(ABSENT)}:
            return np.full(len(cells), np.nan)
        values = np.array(_plain_numbers(cells) or self._parse(name, _number, expected), np.float64)
        absent = np.array([cell is ABSENT for cell in cells]) if ABSENT in cells else np.zeros(len(cells), bool)
        self._refuse(name, ~(((values >= 0) & np.isfinite(values)) | absent), expected)
        return values

    def datetimes_ns(self, name: str) -> np.ndarray:
        """A column of dates and times (UTC where they name no zone), nanoseconds after 1970, int64 [n]."""
        expected = "YYYY-MM-DD HH:MM:SS[.fraction][zone]"
        values = _uniform_datetimes_ns(self.cells[name])
        if values is not None:
            return values
        matches = [DATETIME.fullmatch(cell) if isinstance(cell, str) else None for cell in self.cells[name]]
        if None in matches:
            raise self.error(name, matches.index(None), expected)
        days, times, signs, hours, minutes = zip(*(match.groups() for match in matches if match is not None))
        try:
            values = np.array([f"{day}T{time}" for day, time in zip(days, times)], "datetime64[ns]").astype(np.int64)
        except ValueError:  # there is no such day or hour
            bad = next(i for i, (day, time) in enumerate(zip(days, times)) if not _exists(day, time))
            raise self.error(name, bad, expected) from None
        return values - np.array([_east_ns(*zone) for zone in zip(signs, hours, minutes)], np.int64)

    def integer_lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of lists of 64-bit integers, signed or unsigned: all of them int64 [total] (the same bits), and
        how many each record has, int64 [n]; none where it is ABSENT."""
        lists = self.cells[name]
        if set(map(type, lists)) != {list} or set(map(type, chain.from_iterable(lists))) - {int}:
            lists = self._parse(name, _integer_list, "a list of 64-bit integers")
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        total = int(counts.sum())
        try:
            return np.fromiter(chain.from_iterable(lists), np.int64, total), counts
        except OverflowError:
            lists = self._parse(name, _integer_list, "a list of 64-bit integers")
            if min(map(min, filter(None, lists))) < 0:
                index = next(i for i, values in enumerate(lists) if values and max(values) >= 2**63)
                raise self.error(name, index, "all of them signed or all unsigned 64-bit integers", "both") from None
            return np.fromiter(chain.from_iterable(lists), np.uint64, total).view(np.int64), counts

    def _parse(self, name: str, parse: Callable[[Any], Any], expected: str) -> list[Any]:
        values = list(map(parse, self.cells[name]))
        if None in values:
            raise self.error(name, values.index(None), expected)
        return values

    def _refuse(self, name: str, bad: np.ndarray, expected: str) -> None:
        if bad.any():
            raise self.error(name, int(np.argmax(bad)), expected)


def _digits(cells: Sequence[Any]) -> list[int] | None:
    """The cells as integers where all are integers or text of a few digits, the fast way; None elsewhere."""
    if set(map(type, cells)) == {int} and -(2**62) < min(cells) and max(cells) < 2**62:
        return list(cells)
    try:
        text = "".join(cells)
    except TypeError:
        return None
    if not (text.isascii() and text.isdigit()) or "" in cells or max(map(len, cells)) > 18:
        return None
    return list(map(int, cells))


def _plain_numbers(cells: Sequence[Any]) -> list[float] | None:
    """The cells as numbers where all are numbers or text of digits and points; None elsewhere."""
    kinds = set(map(type, cells))
    if kinds <= {int, float} and (kinds == {float} or max(map(abs, cells)) < 2**53):
        return list(cells)
    try:
        if "".join(cells).strip("0123456789."):
            return None
        return list(map(float, cells))
    except (TypeError, ValueError):
        return None


def _uniform_datetimes_ns(cells: Sequence[Any]) -> np.ndarray | None:
    """Dates and times as Columns.datetimes_ns has them, where all cells are written like the first: the fast way.

    None elsewhere, and where one is no date.
    """
    match = DATETIME.fullmatch(cells[0]) if isinstance(cells[0], str) else None
    if match is None:
        return None
    try:
        letters = np.array(cells, "S")
    except (UnicodeEncodeError, ValueError, TypeError):
        return None
    width = letters.dtype.itemsize
    letters = letters.view(np.uint8).reshape(len(cells), width)  # [n, width], shorter cells end in zeros
    begin, end = match.start(1), match.end(2)
    if len(cells[0]) != width:
        return None
    varying = np.array([begin <= at < end and cells[0][at].isdigit() for at in range(width)])
    digits = letters[:, varying]
    if (letters[:, ~varying] != letters[0, ~varying]).any() or ((digits < ord("0")) | (digits > ord("9"))).any():
        return None
    years = letters[:, begin : begin + 2]
    if (np.isin(years @ np.array([10, 1]) - 11 * ord("0"), (19, 20))).all():
        texts = np.ascontiguousarray(letters[:, begin:end]).view(f"S{end - begin}").reshape(-1)
        try:
            return texts.astype("datetime64[ns]").astype(np.int64) - _east_ns(match[3], match[4], match[5])
        except ValueError:  # there is no such day or hour
            return None
    return None


def _east_ns(sign: str | None, hours: str | None, minutes: str | None) -> int:
    """How far a zone's clock is ahead of UTC."""
    return 0 if sign is None or hours is None else int(f"{sign}1") * (60 * int(hours) + int(minutes or 0)) * 60 * 10**9


def _integer(cell: Any) -> int | None:
    if type(cell) is int:
        return cell if abs(cell) < 2**62 else None
    if type(cell) is float:
        return int(cell) if abs(cell) < 2**53 and cell.is_integer() else None
    return int(cell.split(".")[0]) if isinstance(cell, str) and INTEGER.fullmatch(cell) else None


def _number(cell: Any) -> float | None:
    if type(cell) in (int, float):
        return float(cell) if -(2.0**1000) < cell < 2.0**1000 else None
    if cell is ABSENT:
        return float("nan")
    return float(cell) if isinstance(cell, str) and NUMBER.fullmatch(cell) else None


def _text_bytes(cell: Any) -> int | None:
    """UTF-8 bytes of a text, or of the contents of chat messages."""
    if isinstance(cell, str):
        return len(cell.encode("utf-8", "surrogatepass"))
    if not isinstance(cell, list):
        return None
    parts = [_text_bytes(part.get("content", part.get("text"))) if isinstance(part, dict) else None for part in cell]
    return None if None in parts else sum(part for part in parts if part is not None)


def _exists(day: str, time: str) -> bool:
    """Whether there is such a day and hour."""
    try:
        datetime.fromisoformat(f"{day}T{time[:8]}")
    except ValueError:
        return False
    return True


def _integer_list(cell: Any) -> list[int] | None:
    if cell is ABSENT:
        return []
    if not isinstance(cell, list):
        return None
    good = set(map(type, cell)) <= {int} and (not cell or -(2**63) <= min(cell) <= max(cell) < MAX_HASH)
    return cell if good else None
