"""Readers of real request traces, recognised by their content: Azure, Mooncake, BurstGPT, vidur, the paper's.

    format    file         columns or keys (more are ignored)
    azure     CSV          TIMESTAMP (date and time), ContextTokens, GeneratedTokens
    burstgpt  CSV          Timestamp (s), Request tokens, Response tokens
    vidur     CSV          arrived_at (s, optional), num_prefill_tokens, num_decode_tokens
    mooncake  JSON lines   timestamp (ms), input_length, output_length, hash_ids (one per 512 prompt tokens)
    paper     CSV or JSON  pkvsim.traces.paper_files's

Azure: https://github.com/Azure/AzurePublicDataset; BurstGPT: https://github.com/HPMLL/BurstGPT; vidur:
https://github.com/microsoft/vidur/tree/main/data/processed_traces; Mooncake: https://github.com/kvcache-ai/Mooncake.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pkvsim.shapes import check_int
from pkvsim.traces.columns import Columns, csv_columns, json_columns
from pkvsim.traces.paper_files import csv_rows, is_json, json_rows, names, paper_columns, read_text
from pkvsim.traces.requests import (
    MAX_SEED,
    RequestTrace,
    first_requests,
    gather_blocks,
    jitter,
    scale_rate,
    spread_ticks,
)

MOONCAKE_BLOCK_TOKENS = 512
OTHER_BLOCK_TOKENS = (16, 32, 64, 128, 256, 1024)  # Mooncake's layout as other tools write it
PAPER_STEP_S = 0.02  # a decode step of a busy server
PAPER_NAMES = {"prompt_len", "prompt", "decode_len", "decode"}


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """arrival, prompt and output are column names; optional_arrival: without it all requests arrive at 0."""

    label: str
    arrival: str
    prompt: str
    output: str
    arrival_s: Callable[[Columns, str], np.ndarray]  # [n] float64, from any origin
    optional_arrival: bool = False

    @property
    def columns(self) -> tuple[str, str, str]:
        return self.arrival, self.prompt, self.output


CSV_FORMATS = (
    CsvFormat("Azure LLM inference", "TIMESTAMP", "ContextTokens", "GeneratedTokens", Columns.datetimes_s),
    CsvFormat("BurstGPT", "Timestamp", "Request tokens", "Response tokens", Columns.numbers),
    CsvFormat("vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens", Columns.numbers, True),
)


def read_requests(path: str | Path, *, step_s: float = PAPER_STEP_S) -> RequestTrace:
    """A trace file of any known format. Arrivals start at 0 and are sorted; what was changed is in the notes.

    step_s is how long one arrival step of the paper's format takes. Requests with no prompt or no output
    tokens (failed ones) are left out. Raises ValueError naming the file, and where it applies line and column.
    """
    path = Path(path)
    if not 0 < step_s < np.inf:
        raise ValueError(f"step_s: expected seconds > 0, got {step_s!r}")
    text = read_text(path)
    if not text or text.isspace():
        raise ValueError(f"{path}: expected at least one request, got an empty file")
    line, first = next(json_rows(path, text) if is_json(text) else csv_rows(path, text), (1, ()))
    found = set(first)
    if PAPER_NAMES & found or not found:
        return _read_paper(path, text, step_s)
    return _read_mooncake(path, text) if is_json(text) else _read_csv(path, text, line, found)


def load_requests(
    path: str | Path,
    *,
    rate_scale: float = 1.0,
    jitter_s: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
    step_s: float = PAPER_STEP_S,
) -> RequestTrace:
    """A trace file made ready to replay: coarse ticks spread, its first `limit` requests, rate scaled, jittered.

    Equal seeds give equal arrays. Raises ValueError naming the file or argument.
    """
    check_int("seed", seed, 0, MAX_SEED)
    trace = spread_ticks(read_requests(path, step_s=step_s), seed=seed)  # before a limit hides that they tick
    if limit is not None:
        trace = first_requests(trace, limit)
    return jitter(scale_rate(trace, rate_scale), jitter_s, seed=seed)


def _read_csv(path: Path, text: str, line: int, found: set[str]) -> RequestTrace:
    best = max(CSV_FORMATS, key=lambda known: len(found.intersection(known.columns)))
    missing = [name for name in best.columns if name not in found]
    if len(missing) == len(best.columns):
        known = "; ".join(f"{f.label}: {', '.join(f.columns)}" for f in CSV_FORMATS)
        raise ValueError(f"{path}:{line}: columns of no known trace (known are {known}), found {names(sorted(found))}")
    timed = best.arrival in found
    wanted = [name for name in best.columns if timed or name != best.arrival or not best.optional_arrival]
    columns = csv_columns(path, text, wanted, best.label)
    prompt, output = columns.integers(best.prompt), columns.integers(best.output)
    arrival = best.arrival_s(columns, best.arrival) if timed else None
    return _finish(path, arrival, prompt, output)


def _read_mooncake(path: Path, text: str) -> RequestTrace:
    columns = json_columns(path, text, ("timestamp", "input_length", "output_length", "hash_ids"), "Mooncake")
    prompt, output = columns.integers("input_length"), columns.integers("output_length")
    hashes, offsets = columns.integer_lists("hash_ids")
    counts = np.diff(offsets)
    size, blocks = _block_size(prompt, counts)
    wrong = counts != blocks
    if wrong.any():
        first = int(np.argmax(wrong))
        raise columns.error(
            "hash_ids", first, f"{blocks[first]} of them, one per {size} prompt tokens", f"{counts[first]}"
        )
    arrival = columns.numbers("timestamp") / 1e3
    return _finish(path, arrival, prompt, output, hashes=hashes, offsets=offsets, block_tokens=size)


def _block_size(prompt: np.ndarray, counts: np.ndarray) -> tuple[int, np.ndarray]:
    """The block size (tokens) that explains the most hash counts [n], and what all counts should then be [n]."""
    sizes = (MOONCAKE_BLOCK_TOKENS,) + OTHER_BLOCK_TOKENS
    blocks = [-(-prompt // size) for size in sizes]
    best = max(range(len(sizes)), key=lambda i: int((blocks[i] == counts).sum()))
    return sizes[best], blocks[best]


def _read_paper(path: Path, text: str, step_s: float) -> RequestTrace:
    prompts, decodes, steps = paper_columns(path, text)
    arrival = None if steps is None else np.array(steps, np.float64) * step_s
    note = None if steps is None else f"arrival steps taken as {step_s:g} s each"
    return _finish(path, arrival, np.array(prompts, np.int64), np.array(decodes, np.int64), note=note)


def _finish(
    path: Path,
    arrival_s: np.ndarray | None,  # [n] float64 from any origin; None: all at once
    prompt: np.ndarray,  # [n] int64
    output: np.ndarray,  # [n] int64
    *,
    hashes: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
    block_tokens: int = 0,
    note: str | None = None,
) -> RequestTrace:
    """Leaves out what failed, sorts by arrival, starts at 0."""
    notes = [] if note is None else [note]
    if arrival_s is None:
        notes.append("no arrival times: all requests arrive at 0 s")
        arrival_s = np.zeros(len(prompt))
    if block_tokens not in (0, MOONCAKE_BLOCK_TOKENS):
        notes.append(f"hash_ids taken as one per {block_tokens} prompt tokens")
    kept = np.flatnonzero((prompt > 0) & (output > 0))
    if len(kept) == 0:
        raise ValueError(f"{path}: expected at least one request with prompt and output tokens, got none")
    if len(kept) < len(prompt):
        notes.append(f"{len(prompt) - len(kept):,} requests without prompt or output tokens (failed) left out")
    order = kept[np.argsort(arrival_s[kept], kind="stable")]
    if (np.diff(order) < 0).any():
        notes.append("requests were not in order of arrival: sorted")
    if hashes is not None and offsets is not None:
        hashes, offsets = gather_blocks(hashes, offsets, order)
    return RequestTrace(
        name=path.stem,
        arrival_s=arrival_s[order] - arrival_s[order[0]],
        prompt_tokens=prompt[order],
        output_tokens=output[order],
        block_hashes=hashes,
        block_offsets=offsets,
        block_tokens=block_tokens,
        notes=tuple(notes),
    )
