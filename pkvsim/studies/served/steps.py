"""ServedStep: what a served step computed and took. Reads the files of examples/bench_serve.py that have such steps."""
from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int

MOST_ROWS = 65_535  # of a cell
PROGRESS = 64  # tokens that a cell's rows have generated when it is timed, in the middle of its steps


@dataclass(frozen=True, slots=True, eq=False)
class ServedStep:
    """One step. follows: the device went on from the step before it without waiting for anything."""

    decode_lens: np.ndarray  # [rows] int64, tokens that each decoding row attends to, its new one included
    chunk_begins: np.ndarray  # [chunks] int64, tokens of the prompt that were cached before
    chunk_tokens: np.ndarray  # [chunks] int64
    follows: bool
    us: float  # from the end of the step before where it follows, else from its own start

    @property
    def tokens(self) -> int:
        """Of what is computed."""
        return len(self.decode_lens) + int(self.chunk_tokens.sum())


def step_us(start_us: np.ndarray, end_us: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """What steps took, float64 [steps], from their starts and ends, float64 [steps], and follows, bool [steps]: from
    the end of the one before where the device should not have waited."""
    from_end = np.asarray(follows, bool).copy()
    from_end[:1] = False
    return end_us - np.where(from_end, np.append(0.0, end_us[:-1]), start_us)


def read_served_steps(path: str | Path) -> dict[str, list[ServedStep]]:
    """Steps by the name of their run, of a file of `bench_serve.py --save-steps`. ValueError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        rows, chunks = (np.append(0, np.cumsum(data[name].astype(np.int64))) for name in ("rows", "chunks"))
        lens, begins, tokens = (data[name].astype(np.int64) for name in ("lens", "chunk_begins", "chunk_tokens"))
        found: dict[str, list[ServedStep]] = {}
        for number, name in enumerate(data["names"].tolist()):
            of_run = (data["run"] == number).nonzero()[0]
            follows = data["follows"][of_run]
            us = step_us(data["start_us"][of_run], data["end_us"][of_run], follows)
            found[name] = [
                ServedStep(
                    lens[rows[at] : rows[at + 1]], begins[chunks[at] : chunks[at + 1]],
                    tokens[chunks[at] : chunks[at + 1]], bool(after), float(took),
                )
                for at, after, took in zip(of_run.tolist(), follows, us)
            ]  # fmt: skip
        _check([step for run in found.values() for step in run])
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot read served steps: {error}") from None
    return found


def read_cells(path: str | Path) -> tuple[str, list[ServedStep]]:
    """(model, a decode step of every cell) of a file of `bench_serve.py --json`. ValueError naming the file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        none = np.zeros(0, np.int64)
        model, steps = data["model"], []
        if not isinstance(model, str):
            raise ValueError(f"model: expected text, got {model!r:.80}")
        for cell in data["cells"]:
            check_int("rows", cell["rows"], 1, MOST_ROWS)
            check_int("context", cell["context"], 1, MAX_TOKENS - PROGRESS)
            lens = np.full(cell["rows"], cell["context"] + PROGRESS)
            steps.append(ServedStep(lens, none, none, True, float(cell["step_us"])))
        _check(steps)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot read cells of bench_serve.py: {error}") from None
    return model, steps


def _check(steps: Sequence[ServedStep]) -> None:
    """ValueError where a step has no tokens, or lengths or a time that none can have."""
    for at, step in enumerate(steps):
        rows, begins, tokens = step.decode_lens, step.chunk_begins, step.chunk_tokens
        sizes = np.concatenate([rows, tokens])
        if not (len(begins) == len(tokens) and len(sizes) and sizes.min() >= 1 and begins.min(initial=0) >= 0
                and sizes.max() <= MAX_TOKENS and begins.max(initial=0) <= MAX_TOKENS):
            raise ValueError(f"step {at}: expected rows and chunks of 1 to {MAX_TOKENS:,} tokens")
        if not 0 < step.us < np.inf:
            raise ValueError(f"step {at}: expected a time > 0 us, got {step.us:g}")


def measured_us(steps: Sequence[ServedStep]) -> np.ndarray:
    """What steps took, float64 [steps]."""
    return np.array([step.us for step in steps])
