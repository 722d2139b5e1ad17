"""Reads a request trace of any format that pkvsim.traces.formats knows, as far as asked, with bounded memory."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int
from pkvsim.traces.columns import BYTES_PER_TOKEN, Columns
from pkvsim.traces.formats import BY_VALUE, DATES, RESULTS, ChosenFormat, choose_format, flat_records
from pkvsim.traces.prompt_hashes import whole_hashes
from pkvsim.traces.requests import (
    MAX_SEED,
    RequestTrace,
    first_requests,
    gather_blocks,
    jitter,
    renumber,
    scale_rate,
    spread_ticks,
)
from pkvsim.traces.rows import csv_rows, json_rows
from pkvsim.traces.sources import TextSource, open_source, trace_name
from pkvsim.traces.time_units import SECONDS, STEPS, UNIT_NAMES, check_time_unit, decide_unit

PAPER_STEP_S = 0.02  # a decode step of a busy server
CHUNK_RECORDS = 1 << 13  # records whose cells are held at a time
LOOKAHEAD = 4096  # requests that are read though fewer are asked for: they say the unit and the tick of timestamps
MAX_SPAN_S = 1e10  # 300 years, up to which a clock of float64 microseconds keeps each of them
EXTRAS = ("hash_ids", "delay", "session_id")  # keys of JSON records beside arrival, prompt and output


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The records of a file in its order. arrival is as the file has it: float64 in its unit, NaN for none, or
    int64 nanoseconds for dates."""

    lines: np.ndarray  # [n] int64
    arrival: np.ndarray  # [n] float64 or int64
    prompt: np.ndarray  # [n] int64
    output: np.ndarray  # [n] int64
    delay: np.ndarray  # [n] float64 in the unit of arrival, NaN for none
    session: np.ndarray  # [n] int64, -1 for none
    hashes: np.ndarray  # [total] int64
    counts: np.ndarray  # [n] int64, hashes of each record


def read_requests(
    path: str | Path, *, step_s: float = PAPER_STEP_S, time_unit: str | None = None, limit: int | None = None
) -> RequestTrace:
    """A trace file ("-" for standard input) of any known format, plain, .gz or .zst.

    Arrivals start at 0 and are sorted; what was decided or changed is in the notes. time_unit (s, ms, us, ns or
    steps) overrides the unit that numeric timestamps are taken for; step_s is how long a step takes. Reading stops
    after `limit` requests. Requests with no prompt or no output tokens (failed ones) are left out. Raises ValueError
    naming the file, and where it applies line and column.
    """
    check_time_unit(time_unit)
    if not 0 < step_s < np.inf:
        raise ValueError(f"step_s: expected seconds > 0, got {step_s!r}")
    if limit is not None:
        check_int("limit", limit, 1, MAX_TOKENS)
    with open_source(path) as source:
        if source.empty:
            raise ValueError(f"{source.name}: expected at least one request, got an empty file")
        chosen, table, stopped = _read_table(source, limit)
        notes = [f"only the first {len(table.prompt):,} requests of the file were read"] if stopped else []
        return _finish(path, source.name, chosen, table, step_s, time_unit, notes)


def load_requests(
    path: str | Path,
    *,
    rate_scale: float = 1.0,
    jitter_s: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
    step_s: float = PAPER_STEP_S,
    time_unit: str | None = None,
) -> RequestTrace:
    """A trace file made ready to replay: coarse ticks spread, its first `limit` requests, rate scaled, jittered.

    Equal seeds give equal arrays. Raises ValueError naming the file or argument.
    """
    check_int("seed", seed, 0, MAX_SEED)
    if limit is not None:
        check_int("limit", limit, 1, MAX_TOKENS)
    most = None if limit is None else max(limit, LOOKAHEAD)
    trace = read_requests(path, step_s=step_s, time_unit=time_unit, limit=most)
    trace = spread_ticks(trace, seed=seed)  # before a limit hides that they tick
    if limit is not None:
        trace = first_requests(trace, limit)
    return jitter(scale_rate(trace, rate_scale), jitter_s, seed=seed)


def _read_table(source: TextSource, limit: int | None) -> tuple[ChosenFormat, _Table, bool]:
    """(format, records, whether the file has more). Reads chunk by chunk until `limit` requests did not fail."""
    rows: Iterator[tuple[int, Any]]
    rows = flat_records(source.name, json_rows(source)) if source.is_json else csv_rows(source)
    line, first = next(rows, (1, None))
    if first is None:
        raise ValueError(f"{source.name}: expected at least one request, got none")
    chosen = choose_format(f"{source.name}:{line}", first)
    wanted = [name for name in (chosen.arrival, chosen.prompt, chosen.output) if name is not None]
    if source.is_json:
        wanted = list(dict.fromkeys([*chosen.form.arrival[:1], *wanted, *EXTRAS]))
        rows = chain([(line, first)], rows)
        if chosen.arrival is None:  # a later record may well have it
            chosen = ChosenFormat(chosen.form, chosen.form.arrival[0], chosen.prompt, chosen.output)
    places = None if isinstance(first, dict) else itemgetter(*map(first.index, wanted))
    sessions: dict[Any, int] = {}
    parts: list[_Table] = []
    good = 0
    while limit is None or good < limit:
        lines: list[int] = []
        cells: list[Any] = []  # record after record
        for line, record in islice(rows, CHUNK_RECORDS if limit is None else min(CHUNK_RECORDS, limit - good)):
            lines.append(line)
            cells += map(record.get, wanted) if places is None else places(record)
        if not lines:
            break
        by_name = {name: cells[at :: len(wanted)] for at, name in enumerate(wanted)}
        parts.append(_parse(Columns(source.name, lines, by_name), chosen, sessions))
        good += int(((parts[-1].prompt > 0) & (parts[-1].output > 0)).sum())
    if not parts:
        raise ValueError(f"{source.name}: expected at least one request, got none")
    fields = _Table.__slots__
    table = parts[0] if len(parts) == 1 else _Table(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))
    return chosen, table, limit is not None and good >= limit and next(rows, None) is not None


def _parse(columns: Columns, chosen: ChosenFormat, sessions: dict[Any, int]) -> _Table:
    n = len(columns.lines)
    form = chosen.form
    if chosen.arrival is None:
        arrival = np.full(n, np.nan)
    elif form.unit == DATES:
        arrival = columns.datetimes_ns(chosen.arrival)
    else:
        arrival = columns.numbers(chosen.arrival)
    json = "hash_ids" in columns.cells
    hashes, counts = columns.integer_lists("hash_ids") if json else (np.zeros(0, np.int64), np.zeros(n, np.int64))
    return _Table(
        lines=np.array(columns.lines, np.int64),
        arrival=arrival,
        prompt=columns.text_tokens(chosen.prompt) if form.prompt_is_text else columns.integers(chosen.prompt),
        output=columns.text_tokens(chosen.output) if form.output_is_text else columns.integers(chosen.output),
        delay=columns.numbers("delay") if json else np.full(n, np.nan),
        session=_session_numbers(columns.cells["session_id"], sessions) if json else np.full(n, -1, np.int64),
        hashes=hashes,
        counts=counts,
    )


def _session_numbers(cells: Iterable[Any], sessions: dict[Any, int]) -> np.ndarray:
    """Sessions numbered as they come, int64 [n]; -1 for none."""
    cells = list(cells)
    if cells.count(None) == len(cells):
        return np.full(len(cells), -1, np.int64)
    return np.array([-1 if cell is None else sessions.setdefault(str(cell), len(sessions)) for cell in cells], np.int64)


def _finish(
    path: str | Path,
    file: str,
    chosen: ChosenFormat,
    table: _Table,
    step_s: float,
    time_unit: str | None,
    notes: list[str],
) -> RequestTrace:
    """Arrivals in seconds, hashes for every block, failed requests left out, sorted, from 0 s on."""
    kept = np.flatnonzero((table.prompt > 0) & (table.output > 0))
    if len(kept) == 0:
        raise ValueError(f"{file}: expected at least one request with prompt and output tokens, got none")
    arrival_s, after, think_us, more = _arrivals_s(file, chosen, table, step_s, time_unit)
    if chosen.form.prompt_is_text:
        more.append(f"prompt tokens estimated from text, {BYTES_PER_TOKEN} bytes each (an assumption)")
    if chosen.form.label == "ShareGPT":
        more.append("the first message of each conversation and its reply; later ones left out")
    runs = len(np.unique(table.lines)) if chosen.form is RESULTS else 1
    if runs > 1:
        more.append(f"{runs:,} results in the file, taken as one trace")
    if len(kept) < len(table.prompt):
        more.append(f"{len(table.prompt) - len(kept):,} requests without prompt or output tokens (failed) left out")
    order = kept[np.argsort(arrival_s[kept], kind="stable")]
    span_s = float(arrival_s[order[-1]] - arrival_s[order[0]])
    if not span_s <= MAX_SPAN_S:
        where = f"{file}:{table.lines[order[-1]]}: column {chosen.arrival}"
        raise ValueError(f"{where}: expected arrivals within {MAX_SPAN_S:g} s of each other, got {span_s:g} s")
    if (np.diff(order) < 0).any():
        more.append("requests were not in order of arrival: sorted")
    prompt = table.prompt[order]
    given, ends = gather_blocks(table.hashes, np.append(0, np.cumsum(table.counts)), order)
    hashes, offsets, block_tokens, hash_notes = whole_hashes(file, table.lines[order], prompt, given, np.diff(ends))
    return RequestTrace(
        name=trace_name(path),
        arrival_s=arrival_s[order] - arrival_s[order[0]],
        prompt_tokens=prompt,
        output_tokens=table.output[order],
        block_hashes=hashes,
        block_offsets=offsets,
        block_tokens=block_tokens,
        session=None if after is None else table.session[order].astype(np.int32),
        after=None if after is None else renumber(after, order),
        think_us=None if think_us is None else think_us[order],
        notes=tuple(notes + more + hash_notes),
    )


def _arrivals_s(
    file: str, chosen: ChosenFormat, table: _Table, step_s: float, time_unit: str | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, list[str]]:
    """(arrivals float64 [n] seconds from any origin, after int32 [n], think_us float64 [n], notes).

    A record without a timestamp comes `delay` after the record before it of its session, or of the file; within a
    session it waits for that one's end. after and think_us are None where no record does.
    """
    form = chosen.form
    notes: list[str] = []
    if form.unit == DATES:
        if time_unit is not None:
            raise ValueError(f"time_unit: {file} has dates and times, which need none")
        return (table.arrival - table.arrival.min()) / 1e9, None, None, notes
    timed = ~np.isnan(table.arrival)
    unit = time_unit or form.unit
    if not timed.any():
        notes.append("no arrival times: all requests arrive at 0 s")
        unit = "ms" if unit in (BY_VALUE, STEPS) else unit
    elif unit == BY_VALUE:
        unit, why = decide_unit(table.arrival[timed])
        notes.append(f"timestamps taken as {UNIT_NAMES[unit]}: {why} (--time-unit overrides)")
    elif unit == STEPS and time_unit is None and (table.arrival[timed] % 1).any():
        unit = "s"
        notes.append("arrivals have fractions, so they are taken as seconds (--time-unit overrides)")
    elif unit == STEPS:
        notes.append(
            f"arrival steps taken as {step_s:g} s each, an assumption (--step-seconds or --time-unit overrides)"
        )
    elif time_unit is not None:
        notes.append(f"timestamps taken as {UNIT_NAMES[unit]}, as asked")
    factor = step_s if unit == STEPS else SECONDS[unit]
    arrival_s = (table.arrival - (table.arrival[timed].min() if timed.any() else 0)) * factor
    if timed.all():
        return arrival_s, None, None, notes
    return (*_follow(file, chosen, table, arrival_s, timed, factor), notes)


def _follow(
    file: str, chosen: ChosenFormat, table: _Table, arrival_s: np.ndarray, timed: np.ndarray, factor: float
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gives the records that are not timed their arrivals: (arrival_s, after, think_us)."""
    arrival_s = arrival_s.copy()
    after = np.full(len(arrival_s), -1, np.int32)
    think_us = np.zeros(len(arrival_s))
    none_timed = not timed.any()
    latest: dict[int, int] = {}  # by session, its last record
    for index in range(len(arrival_s)):
        session = int(table.session[index])
        before = latest.get(session, -1) if session >= 0 else -1
        if not timed[index]:
            delay = table.delay[index] * factor
            if np.isnan(delay) and before < 0 and not none_timed:
                where = f"{file}:{table.lines[index]}: column {chosen.arrival}"
                raise ValueError(f"{where}: expected a number >= 0, or a delay after an earlier request, got nothing")
            delay = 0.0 if np.isnan(delay) else delay
            if before >= 0:
                after[index], think_us[index] = before, delay * 1e6
                arrival_s[index] = arrival_s[before] + delay
            else:
                arrival_s[index] = delay + (arrival_s[index - 1] if index > 0 and not none_timed else 0.0)
        if session >= 0:
            latest[session] = index
    return (arrival_s, after, think_us) if (after >= 0).any() else (arrival_s, None, None)
