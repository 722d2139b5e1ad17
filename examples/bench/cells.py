"""The grids of bench_decode: which shapes and lengths each named set measures."""
from __future__ import annotations

import csv
import pathlib
from dataclasses import dataclass

import numpy as np

UNIFORM_BATCHES = (1, 2, 4, 8, 16, 32, 64)
UNIFORM_LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
MAX_TOKENS = 2 << 20
GROUP_HEADS = ((32, 32), (40, 8), (28, 4), (64, 8), (128, 8))
GROUP_BATCHES = (1, 8, 64)
GROUP_LENGTHS = (2048, 8192, 32768)
RAGGED_FILE = pathlib.Path(__file__).with_name("ragged_cells.csv")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured step: the heads and the length of every row."""

    case: str
    num_q_heads: int
    num_kv_heads: int
    seq_lens: tuple[int, ...]
    ragged: bool = False

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens)

    def lengths(self) -> np.ndarray:
        return np.asarray(self.seq_lens, dtype=np.int32)  # [batch_size]


def _label(length: int) -> str:
    return f"{length // 1024}K"


def uniform_cells() -> list[Cell]:
    """46 cells: every batch and length with at most MAX_TOKENS tokens in all."""
    return [Cell(case=_label(length), num_q_heads=32, num_kv_heads=8, seq_lens=(length,) * batch)
            for batch in UNIFORM_BATCHES for length in UNIFORM_LENGTHS if batch * length <= MAX_TOKENS]


def ragged_cells() -> list[Cell]:
    """20 cells of mixed lengths: bimodal, uniform, zipf, one long row among short ones."""
    with RAGGED_FILE.open(newline="") as file:
        return [Cell(case=row["case"], num_q_heads=32, num_kv_heads=8, ragged=True,
                     seq_lens=tuple(int(length) for length in row["seq_lens"].split()))
                for row in csv.DictReader(file)]


def group_cells() -> list[Cell]:
    """45 cells at group sizes 1, 5, 7, 8 and 16."""
    return [Cell(case=f"{heads}/{kv_heads} {_label(length)}", num_q_heads=heads, num_kv_heads=kv_heads,
                 seq_lens=(length,) * batch)
            for heads, kv_heads in GROUP_HEADS for batch in GROUP_BATCHES for length in GROUP_LENGTHS]


def short_cells() -> list[Cell]:
    """A few cells of every kind, for a quick look."""
    wanted = {(1, "1K"), (1, "8K"), (4, "4K"), (8, "8K"), (8, "32K"), (64, "4K"), (64, "32K")}
    ragged = {(8, "bimodal"), (32, "bimodal"), (32, "skew1long"), (64, "skew1long")}
    return ([cell for cell in uniform_cells() if (cell.batch_size, cell.case) in wanted]
            + [cell for cell in ragged_cells() if (cell.batch_size, cell.case) in ragged])


GRIDS = {"default": lambda: uniform_cells() + ragged_cells(), "uniform": uniform_cells, "ragged": ragged_cells,
         "short": short_cells, "groups": group_cells, "all": lambda: uniform_cells() + ragged_cells() + group_cells()}
