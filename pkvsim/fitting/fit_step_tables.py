"""Fits what a step costs outside attention to measured step times of an engine: decode steps by rows and context, and
steps with a prefill chunk."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.models.model_spec import ModelSpec
from pkvsim.outside.engine_profile import EngineProfile
from pkvsim.outside.step_costs import PARTS, step_costs, step_parts

FREE = (
    "matrix_share", "attention_share", "attention_us", "decode_share", "decode_cta_gb_s", "mixed_share",
    "mixed_cta_gb_s", "kernel_us", "row_us", "chunk_step_us",
)  # fmt: skip
LOSS_SCALE = 0.03  # error beyond which a step counts as an outlier: clocks that change in the middle of a run


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One row of a table: a step of rows that decode at a mean context, and one chunk of a prompt or none."""

    rows: int
    context: int  # tokens of a row, the mean
    begin: int  # first token of the chunk
    chunk: int  # tokens; 0: none
    us: float


def read_steps(path: str | Path, *, run: str | None = None) -> list[MeasuredStep]:
    """A table with columns decode_rows, mean_context, median_ms, or prefill_tokens, past, decode_rows, decode_context
    (all rows together), median_ms. run: the value of column `run` to take. ValueError naming file, line and field."""
    found = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            prefill = "prefill_tokens" in (reader.fieldnames or ())
            names = ("decode_rows", "median_ms") + (
                ("prefill_tokens", "past", "decode_context") if prefill else ("mean_context",)
            )
            missing = set(names) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path}: missing columns: {', '.join(sorted(missing))}")
            for row in reader:
                if run is not None and row.get("run") != run:
                    continue
                try:
                    value = {name: float(row[name]) for name in names}
                except (TypeError, ValueError):
                    raise ValueError(f"{path}:{reader.line_num}: expected numbers in {', '.join(names)}") from None
                rows = int(value["decode_rows"])
                context = value["decode_context"] / max(rows, 1) if prefill else value["mean_context"]
                begin, chunk = (int(value["past"]), int(value["prefill_tokens"])) if prefill else (0, 0)
                found.append(MeasuredStep(rows, int(context), begin, chunk, value["median_ms"] * 1e3))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read steps: {error}") from None
    return found


def price_steps(
    steps: Sequence[MeasuredStep],
    model: ModelSpec,
    device: DeviceSpec,
    constants: OutsideConstants,
    profile: EngineProfile,
) -> np.ndarray:
    """Time in us of every step on a warm GPU: float64 [steps]."""
    most = max(step.rows + step.chunk for step in steps)
    costs = step_costs(
        model, device, constants, profile, step_tokens=int(profile.padded(most)[-1]),
        max_batch=max(1, *(step.rows + 1 for step in steps)),
    )  # fmt: skip
    parts, none = np.zeros(len(PARTS)), np.zeros(0, np.int64)
    priced = np.zeros(len(steps))
    for at, step in enumerate(steps):
        begins = np.array([step.begin]) if step.chunk else none
        chunks = np.array([step.chunk]) if step.chunk else none
        lens = np.full(step.rows, step.context, np.int64)
        priced[at] = step_parts(costs, lens, begins, chunks, step.rows + len(chunks), 0.0, 1.0, parts)
    return priced


def fit_step_tables(
    steps: Sequence[MeasuredStep],
    model: ModelSpec,
    device: DeviceSpec,
    start: OutsideConstants,
    profile: EngineProfile,
    *,
    free: Sequence[str] = FREE,
) -> OutsideConstants:
    """The constants that price these steps best. Decode steps and steps with a chunk count alike, whatever their
    number; steps far off count little."""
    from scipy.optimize import least_squares

    measured = np.array([step.us for step in steps])
    chunked = np.array([step.chunk > 0 for step in steps])
    kinds = np.where(chunked, chunked.sum(), (~chunked).sum())
    weight = np.sqrt(len(steps) / np.maximum(kinds, 1))
    origin = np.array([getattr(start, name) for name in free])

    def constants(at: np.ndarray) -> OutsideConstants:
        return replace(start, **dict(zip(free, (float(f"{x:.4g}") for x in origin * np.exp(at)))))

    def residuals(at: np.ndarray) -> np.ndarray:
        tried = replace(start, **dict(zip(free, (origin * np.exp(at)).tolist())))
        off = np.log(price_steps(steps, model, device, tried, profile) / measured)
        return weight * np.sign(off) * LOSS_SCALE * np.sqrt(2 * (np.sqrt(1 + (off / LOSS_SCALE) ** 2) - 1))

    return constants(least_squares(residuals, np.zeros(len(free)), diff_step=1e-3, bounds=(-4, 4)).x)
