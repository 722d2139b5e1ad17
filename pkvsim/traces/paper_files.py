"""Readers of the paper's request files: CSV, JSON (an array, or an object with "requests") and JSON lines.

Columns: prompt_len or prompt, decode_len or decode, optionally arrival or arrival_step.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkvsim.shapes import MAX_TOKENS, check_int
from pkvsim.traces.paper_families import MAX_SEED, Trace, make_trace
from pkvsim.traces.rows import csv_rows, json_rows, names
from pkvsim.traces.sources import TextSource, open_source

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
    with open_source(path) as source:
        prompts, decodes, arrivals = _columns(source, requests)
    return make_trace(
        "file", seed, prompts, decodes, arrivals, max_active=max_active, steps=steps, page_size=page_size
    )


def _columns(source: TextSource, requests: int | None) -> tuple[list[int], list[int], list[int] | None]:
    """Prompt lengths, decode lengths and arrival steps (None without such a column); reading stops at `requests`."""
    file = source.name
    rows = json_rows(source) if source.is_json else _csv_records(source)
    values: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for count, (line, record) in enumerate(rows):
        if requests is not None and count >= requests:
            break
        for name in COLUMNS:
            value = _field(file, line, record, name)
            if value is not None:
                values[name].append(value)
        if values["arrival"] and len(values["arrival"]) != count + 1:
            raise ValueError(f"{file}:{line}: column arrival: expected in every request or in none")
    if not values["prompt"]:
        raise ValueError(f"{file}: expected at least one request, got none")
    return values["prompt"], values["decode"], values["arrival"] or None


def _field(file: str, line: int, record: dict[str, Any], name: str) -> int | None:
    spellings, low = COLUMNS[name]
    present = [s for s in spellings if s in record]
    if not present and name == "arrival":
        return None
    if len(present) != 1:
        raise ValueError(
            f"{file}:{line}: column {' or '.join(spellings)}: expected one of them, found {names(record)}"
        )
    value = record[present[0]]
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_TOKENS:
        raise ValueError(
            f"{file}:{line}: column {present[0]}: expected an integer in [{low}, {MAX_TOKENS}], got {ascii(value):.200}"
        )
    return value


def _csv_records(source: TextSource) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] = []
    for line, cells in csv_rows(source):
        if header:
            yield line, dict(zip(header, cells))
            continue
        header = cells
        for spellings, _ in (COLUMNS["prompt"], COLUMNS["decode"]):
            if not set(spellings) & set(header):
                raise ValueError(
                    f"{source.name}:{line}: column {' or '.join(spellings)}: missing, found {names(header)}"
                )
