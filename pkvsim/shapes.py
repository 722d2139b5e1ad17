"""What a decode step is: the model's attention shape and the state of the batch."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_TOKENS = 2**31 - 1  # lengths and page ids travel to the GPU as int32


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; a ValueError that names `name` otherwise (bool is no integer)."""
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an integer {span}, got {value!r}")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether `value` is a real number of Python or NumPy, NaN and infinities among them (bool is none)."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def describe(value: Any) -> str:
    """dtype and shape of an array, for error messages: `int64 [8, 16]`."""
    return f"{value.dtype} {list(value.shape)}"


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Attention shape of one layer.

    num_q_heads (Hq) is a multiple of num_kv_heads (Hkv); page_size counts tokens.
    Raises ValueError naming the field, what was expected and what came.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    def __post_init__(self) -> None:
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "page_size"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), 1, MAX_TOKENS))
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_q_heads}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads


def check_seq_lens(seq_lens: Any, name: str = "seq_lens") -> np.ndarray:
    """`seq_lens` as int32 [batch_size]; ValueError that names `name` unless it is one row of integers in [0, 2^31)."""
    try:
        array = np.asarray(seq_lens)
    except (ValueError, TypeError) as error:  # rows of different lengths, or an array that is on a GPU
        raise ValueError(f"{name}: expected integers [batch_size] on the host, got {error}") from None
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers [batch_size], got {describe(array)}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > MAX_TOKENS:
        bad = int(np.flatnonzero((array < 0) | (array > MAX_TOKENS))[0])
        raise ValueError(f"{name}[{bad}]: expected a length in [0, {MAX_TOKENS}], got {int(array[bad])}")
    return array.astype(np.int32, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class StepState:
    """The batch at one decode step.

    seq_lens [batch_size] int32, tokens in cache, 0 allowed; block_table [batch_size, max_pages] int32
    or None. Any integer arrays or lists are accepted and converted. Raises ValueError.
    """

    seq_lens: np.ndarray  # [batch_size] int32
    block_table: np.ndarray | None = None  # [batch_size, max_pages] int32

    def __post_init__(self) -> None:
        object.__setattr__(self, "seq_lens", check_seq_lens(self.seq_lens))
        if self.block_table is None:
            return
        table = np.asarray(self.block_table)
        if table.ndim != 2 or table.dtype.kind not in "iu" or table.shape[0] != self.batch_size:
            raise ValueError(f"block_table: expected int32 [{self.batch_size}, max_pages], got {describe(table)}")
        if table.dtype != np.int32:  # an id past 31 bits is nobody's page, and must not become one by losing bits
            table = np.clip(table.astype(np.int64), -MAX_TOKENS - 1, MAX_TOKENS).astype(np.int32)
        object.__setattr__(self, "block_table", table)

    @property
    def batch_size(self) -> int:
        """Rows, zero-length ones included."""
        return len(self.seq_lens)

    def check_pages(self, shape: DecodeShape, *, num_pages: int | None = None) -> None:
        """ValueError unless the table covers every row and, given num_pages, owned ids lie in the pool.

        Entries past a row's last page are never looked at.
        """
        if self.block_table is None:
            raise ValueError(f"block_table: expected int32 [{self.batch_size}, max_pages], got None")
        pages = -(-self.seq_lens.astype(np.int64) // shape.page_size)  # [batch_size]
        needed = int(pages.max(initial=0))
        if self.block_table.shape[1] < needed:
            raise ValueError(
                f"block_table: expected int32 [{self.batch_size}, >={needed}], got {describe(self.block_table)}"
            )
        if num_pages is None:
            return
        owned = np.arange(self.block_table.shape[1]) < pages[:, None]
        bad = np.argwhere(owned & ((self.block_table < 0) | (self.block_table >= num_pages)))
        if len(bad):
            row, column = (int(x) for x in bad[0])
            raise ValueError(
                f"block_table[{row}, {column}]: expected a page id in [0, {num_pages}), "
                f"got {int(self.block_table[row, column])}"
            )
