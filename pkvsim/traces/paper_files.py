"""Readers of the paper's request files: CSV, JSON (an array, or an object with "requests") and JSON lines.

Columns: prompt_len or prompt, decode_len or decode, optionally arrival or arrival_step.
"""
from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pkvsim.shapes import MAX_TOKENS, check_int
from pkvsim.traces.paper_families import MAX_SEED, Trace, make_trace

# ASCII: int() and float() refuse some of what \s takes for white space elsewhere.
INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)
COLUMNS = {  # name: (its spellings, least value)
    "prompt": (("prompt_len", "prompt"), 1),
    "decode": (("decode_len", "decode"), 1),
    "arrival": (("arrival", "arrival_step"), 0),
}


def read_trace(
    path: str | Path, *, seed: int = 0, requests: int | None = None, max_active: int, steps: int, page_size: int = 16
) -> Trace:
    """The first `requests` requests of a file (all by default) as a Trace of family "file".

    Without an arrival column request i arrives at step i // max_active. seed shuffles the pages.
    Raises ValueError naming the file, and where it applies the line and column.
    """
    check_int("seed", seed, 0, MAX_SEED)
    path = Path(path)
    prompts, decodes, arrivals = paper_columns(path, read_text(path), requests=requests)
    return make_trace(
        "file", seed, prompts, decodes, arrivals, max_active=max_active, steps=steps, page_size=page_size
    )


def paper_columns(
    path: Path, text: str, *, requests: int | None = None
) -> tuple[list[int], list[int], list[int] | None]:
    """Prompt lengths, decode lengths and arrival steps (None without such a column) of `text`, path's content."""
    rows = json_rows(path, text) if is_json(text) else _csv_records(path, text)
    values: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for count, (line, record) in enumerate(rows):
        if requests is not None and count >= requests:
            break
        for name in COLUMNS:
            value = _field(path, line, record, name)
            if value is not None:
                values[name].append(value)
        if values["arrival"] and len(values["arrival"]) != count + 1:
            raise ValueError(f"{path}:{line}: column arrival: expected in every request or in none")
    if not values["prompt"]:
        raise ValueError(f"{path}: expected at least one request, got none")
    return values["prompt"], values["decode"], values["arrival"] or None


def read_text(path: Path) -> str:
    """A UTF-8 file's content, a byte order mark left out; ValueError naming the file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None


def is_json(text: str) -> bool:
    """Whether a trace is JSON rather than CSV: no CSV header starts with a bracket or brace."""
    return re.match(r"\s*[\[{]", text) is not None


def names(columns: Iterable[Any]) -> str:
    """Column names for an error message, on one line however odd they are."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in map(str, columns))
    return (shown if len(shown) <= 200 else shown[:200] + " ...") or "none"


def _field(path: Path, line: int, record: dict[str, Any], name: str) -> int | None:
    spellings, low = COLUMNS[name]
    present = [s for s in spellings if s in record]
    if not present and name == "arrival":
        return None
    if len(present) != 1:
        raise ValueError(
            f"{path}:{line}: column {' or '.join(spellings)}: expected one of them, found {names(record)}"
        )
    value = record[present[0]]
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_TOKENS:
        raise ValueError(
            f"{path}:{line}: column {present[0]}: expected an integer in [{low}, {MAX_TOKENS}], got {ascii(value):.200}"
        )
    return value


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] = []
    for line, cells in csv_rows(path, text):
        if header:
            yield line, dict(zip(header, cells))
            continue
        header = cells
        for spellings, _ in (COLUMNS["prompt"], COLUMNS["decode"]):
            if not set(spellings) & set(header):
                raise ValueError(f"{path}:{line}: column {' or '.join(spellings)}: missing, found {names(header)}")


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The header, its names stripped and distinct, then rows as wide as it; blank lines are left out.

    With each row the line it begins on: a quoted cell may span lines.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if len(cells) == len(header) and cells:
                yield line, cells
            elif any(cell.strip() for cell in cells):
                if header:
                    missing = f": column {names(header[len(cells):])} missing" if len(cells) < len(header) else ""
                    raise ValueError(f"{path}:{line}: expected {len(header)} columns, got {len(cells)}{missing}")
                header = [cell.strip() for cell in cells]
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise ValueError(f"{path}:{line}: column {names(sorted(twice))}: expected once")
                yield line, header
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error}") from None


def json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Walks the objects one by one, each with its line, so that an error knows where it is."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0, " \t\r\n")
    if text.startswith("{", position):
        wrapped = re.compile(r'\{\s*"requests"\s*:\s*(?=\[)').match(text, position)
        if wrapped:
            _decode(decoder, path, text, position)  # all of it, so that a file cut off after the array is seen
            position = wrapped.end()
    in_array = text.startswith("[", position)
    position += in_array
    line, counted = 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text) and not in_array:
            return
        if in_array and text.startswith("]", position):
            return
        record, position = _decode(decoder, path, text, position)
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{line}: expected an object per request, got {ascii(record):.200}")
        yield line, record


def _decode(decoder: json.JSONDecoder, path: Path, text: str, position: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        line = text.count("\n", 0, position) + 1
        raise ValueError(f"{path}:{line}: {error}") from None


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
