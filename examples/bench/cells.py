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
# Of Azure's code service: prompts of lognormal lengths with the trace's median, spread and longest
# (github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_code 2023), somewhere on the way through short answers.
AZURE_LOG_MEAN, AZURE_LOG_SPREAD, AZURE_LONGEST = 7.29, 0.98, 7437
AZURE_BATCHES = {(32, 8): (12, 16, 20, 24), (28, 4): (12, 24, 36, 48), (64, 8): (12, 24, 36, 48)}  # by heads
AZURE_DRAWS = 3
CHAT_BATCHES, CHAT_DRAWS, CHAT_LOG_MEAN, CHAT_LOG_SPREAD, CHAT_LONGEST = range(1, 7), 3, 6.2, 0.7, 2048
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


def azure_cells(*heads: tuple[int, int]) -> list[Cell]:
    """12 ragged steps for each (query heads, KV heads): 12 to 48 rows of a code service, 60 to 270 MB of KV."""
    return [_drawn(f"azure {q}/{kv}", q, kv, rows, AZURE_LOG_MEAN, AZURE_LOG_SPREAD, AZURE_LONGEST, draw)
            for q, kv in heads for rows in AZURE_BATCHES[q, kv] for draw in range(AZURE_DRAWS)]


def chat_cells() -> list[Cell]:
    """18 steps of one to six short rows, 1 to 16 MB of KV at head_dim 128 in 16 bits."""
    return [_drawn("chat", 32, 8, rows, CHAT_LOG_MEAN, CHAT_LOG_SPREAD, CHAT_LONGEST, draw)
            for rows in CHAT_BATCHES for draw in range(CHAT_DRAWS)]


def _drawn(case: str, q: int, kv: int, rows: int, mean: float, spread: float, longest: int, draw: int) -> Cell:
    lens = np.exp(np.random.default_rng([rows, draw]).normal(mean, spread, rows))
    return Cell(case, q, kv, tuple(np.clip(lens, 16, longest).astype(int).tolist()), ragged=True)


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


GRIDS = {
    "default": lambda: uniform_cells() + ragged_cells(), "uniform": uniform_cells, "ragged": ragged_cells,
    "azure": lambda: azure_cells((32, 8), (28, 4)), "azure-64/8": lambda: azure_cells((64, 8)), "chat": chat_cells,
    "short": short_cells, "groups": group_cells, "all": lambda: uniform_cells() + ragged_cells() + group_cells(),
}  # fmt: skip
