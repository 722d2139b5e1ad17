"""Readers of the paper's request files: CSV, JSON (an array, or an object with "requests") and JSON lines.

Columns: prompt_len or prompt, decode_len or decode, optionally arrival or arrival_step.
"""
from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkvsim.shapes import MAX_TOKENS
from pkvsim.traces import Trace, make_trace

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
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
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
    arrivals = values["arrival"] or None
    return make_trace(
        "file", seed, values["prompt"], values["decode"], arrivals,
        max_active=max_active, steps=steps, page_size=page_size,
    )  # fmt: skip


def _field(path: Path, line: int, record: dict[str, Any], name: str) -> int | None:
    spellings, low = COLUMNS[name]
    present = [s for s in spellings if s in record]
    if not present and name == "arrival":
        return None
    if len(present) != 1:
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{path}:{line}: column {' or '.join(spellings)}: expected one of them, found {found}")
    value = record[present[0]]
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_TOKENS:
        raise ValueError(
            f"{path}:{line}: column {present[0]}: expected an integer in [{low}, {MAX_TOKENS}], got {value!r}"
        )
    return value


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                for spellings, _ in (COLUMNS["prompt"], COLUMNS["decode"]):
                    if not set(spellings) & set(header):
                        raise ValueError(
                            f"{path}:{reader.line_num}: column {' or '.join(spellings)}: missing, "
                            f"found {', '.join(header)}"
                        )
                continue
            if len(cells) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: expected {len(header)} columns, got {len(cells)}")
            yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Walks the values one by one, so that an error knows its line."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0, " \t\r\n")
    if text.startswith("{", position):
        wrapped = re.compile(r'\{\s*"requests"\s*:\s*(?=\[)').match(text, position)
        position = wrapped.end() if wrapped else position
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
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: column {error.colno}: {error.msg}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{line}: expected an object per request, got {record!r}")
        yield line, record


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
