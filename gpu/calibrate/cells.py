"""What calibration measures: the steps, and on each the routes and split counts. Needs no GPU."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pkvsim import DecodeShape
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.traces.paper_families import paper_trace

SEED = 20260622  # the paper's calibration seed; 20260623 to 20260627 are held out
HEAD_DIM, PAGE_SIZE = 128, 16
HEADS = ((32, 8), (32, 32), (32, 4), (32, 2))  # query and KV heads: group sizes 4, 1, 8, 16
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
COARSE_BATCHES, COARSE_LENGTHS = (1, 4, 16, 64), (1024, 8192, 32768)
MAX_KV_BYTES = 4 << 30
SPLITS = (1, 2, 4, 8, 16, 32, 64)
ROW_SPLITS = (4, 8, 20)  # pinned on both host-planned routes where the step itself is what varies
SPLIT_ROUTES = ("split", "workqueue")


@dataclass(frozen=True, slots=True)
class CalibrationCell:
    """One step and what is timed on it."""

    group: str
    shape: DecodeShape
    seq_lens: tuple[int, ...]
    routes: tuple[str, ...] | None = None  # None: every route that this machine has
    splits: tuple[int, ...] = ()  # of split and workqueue, each timed; empty: both are left out

    def lengths(self) -> np.ndarray:
        return np.asarray(self.seq_lens, dtype=np.int32)  # [batch_size]

    @property
    def kv_bytes(self) -> int:
        return useful_kv_bytes(self.shape, self.lengths())

    def timings(self, available: tuple[str, ...]) -> Iterator[tuple[str, int | None]]:
        """(route, pinned splits or None) of everything to time here on a machine with these routes."""
        for route in available if self.routes is None else self.routes:
            if route not in available:
                continue
            if route in SPLIT_ROUTES:
                yield from ((route, splits) for splits in self.splits)
            else:
                yield route, None


def shape_of(heads: tuple[int, int]) -> DecodeShape:
    return DecodeShape(num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=HEAD_DIM, page_size=PAGE_SIZE)


def grid_cells(heads: tuple[int, int]) -> list[CalibrationCell]:
    """Equal rows: every batch and length for group size 4, a coarse grid for the others."""
    shape, fine = shape_of(heads), heads == HEADS[0]
    cells = []
    for batch in BATCHES if fine else COARSE_BATCHES:
        for length in LENGTHS if fine else COARSE_LENGTHS:
            pinned = (4, 16) if batch < 16 else (1, 4)
            cell = CalibrationCell("grid", shape, (length,) * batch, splits=pinned)
            if cell.kv_bytes <= MAX_KV_BYTES:
                cells.append(cell)
    return cells


def sweep_cells() -> list[CalibrationCell]:
    """What one CTA can read, the fixed cost of a task, and what merging rows x splits costs."""
    shape = shape_of(HEADS[0])
    sweeps = [
        CalibrationCell("splits", shape, (length,) * batch, routes=SPLIT_ROUTES, splits=SPLITS)
        for batch, length in ((1, 8192), (1, 32768), (8, 8192))
    ]
    merges = [
        CalibrationCell("merge", shape, (2048,) * batch, routes=("workqueue",), splits=(1, 2, 4, 8, 16))
        for batch in (8, 32, 64)
    ]
    groups = [
        CalibrationCell("splits", shape_of(heads), (8192,), routes=("workqueue",), splits=(1, 4, 16, 64))
        for heads in HEADS[1:]
    ]
    return sweeps + merges + groups


def segment_cells() -> list[CalibrationCell]:
    """Many short rows: what balanced pays for every segment of a CTA, the others for every task."""
    shape = shape_of(HEADS[0])
    return [
        CalibrationCell("segments", shape, (length,) * batch, splits=(1,))
        for batch, length in ((128, 128), (512, 128), (256, 512), (128, 1024), (1024, 256))
    ]


def ragged_cells(heads: tuple[int, int], batches: tuple[int, ...], picks: int) -> list[CalibrationCell]:
    """`picks` steps of each of the paper's families at the calibration seed, and one long row among short ones."""
    shape = shape_of(heads)
    cells = []
    for batch in batches:
        for family in ("bimodal", "uniform", "zipf"):
            trace = paper_trace(family, SEED, max(16, 3 * batch), batch, 48, page_size=PAGE_SIZE)
            steps = list(trace.iter_steps())
            for index in np.linspace(0, len(steps) - 1, picks).astype(int).tolist():
                cells.append(
                    CalibrationCell(family, shape, tuple(steps[index].seq_lens.tolist()), splits=ROW_SPLITS[1:])
                )
        if batch > 1:
            cells.append(CalibrationCell("skew", shape, (65536,) + (1024,) * (batch - 1), splits=ROW_SPLITS[:1]))
    return [cell for cell in cells if cell.kv_bytes <= MAX_KV_BYTES]


def calibration_cells(*, quick: bool) -> list[CalibrationCell]:
    """All cells, the weightiest first, so that a run cut short still calibrates; about a fifth of them when quick."""
    if quick:
        few = [
            cell
            for cell in grid_cells(HEADS[0])
            if len(cell.seq_lens) in (1, 8, 64) and cell.seq_lens[0] in COARSE_LENGTHS
        ]
        return (
            few
            + ragged_cells(HEADS[0], (8, 32), 1)
            + sweep_cells()[:1]
            + segment_cells()[:2]
            + grid_cells(HEADS[2])[::3]
        )
    cells = grid_cells(HEADS[0]) + ragged_cells(HEADS[0], (2, 4, 8, 16, 32, 64), 2) + sweep_cells() + segment_cells()
    for heads in HEADS[1:]:
        cells += grid_cells(heads) + ragged_cells(heads, (4, 8, 32), 1)
    return cells
