"""Where a step's lengths and page ids are: a block table or CSR, of int32 or int64, on the GPU or the host."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu.inputs import arrays
from gpu.inputs.arrays import ArrayView


@dataclass(frozen=True, slots=True)
class TableLayout:
    """What of a step's tables the kernels are compiled for; the defaults are an int32 block table with seq_lens."""

    int64: bool = False  # page ids
    csr: bool = False
    last_page: bool = False  # lengths are told by the rows' pages and last_page_len

    def defines(self) -> dict[str, int]:
        flags = {"TABLE_INT64": self.int64, "TABLE_CSR": self.csr, "LAST_PAGE_LENGTHS": self.last_page}
        return {name: 1 for name, given in flags.items() if given}


class StepTables(NamedTuple):
    """The arrays of DecodeEngine.plan(), None where one was not given.

    A block table goes with seq_lens; indptr and indices (CSR) with either seq_lens or last_page_len.
    """

    seq_lens: Any = None  # [batch_size] int32
    block_table: Any = None  # [batch_size, max_pages] int32 or int64
    indptr: Any = None  # [batch_size + 1] int32: row r owns indices[indptr[r]:indptr[r + 1]]
    indices: Any = None  # [num_indices] int32 or int64
    last_page_len: Any = None  # [batch_size] int32, tokens in each row's last page

    @property
    def is_csr(self) -> bool:
        return self.indptr is not None or self.indices is not None or self.last_page_len is not None

    def views(self) -> dict[str, ArrayView]:
        """The arrays described, by argument name: those that were given and those that must be.

        Raises ValueError naming the argument that is missing, or is there beside another that excludes it.
        """
        lengths = "last_page_len" if self.is_csr and self.seq_lens is None else "seq_lens"
        needed = {lengths, "indptr", "indices"} if self.is_csr else {"seq_lens", "block_table"}
        for name, array in zip(self._fields, self):
            if array is not None and name not in needed:
                others = " and ".join(sorted(needed))
                raise ValueError(f"{name}: expected None beside {others}, got {type(array).__name__}")
        return {name: arrays.view(name, array) for name, array in zip(self._fields, self) if name in needed}

    def lengths_on_host(self, views: dict[str, ArrayView]) -> bool:
        """Whether all that tells the rows' lengths, and how many pages they have, is on the host."""
        return all(array.device < 0 for name, array in views.items() if name not in ("block_table", "indices"))

    def layout(self, views: dict[str, ArrayView]) -> TableLayout:
        ids = views["indices" if self.is_csr else "block_table"]
        return TableLayout(int64=ids.dtype == "int64", csr=self.is_csr, last_page=self.last_page_len is not None)

    def on_host(self, *, page_ids: bool) -> StepTables:
        """NumPy arrays of the same contents, the page ids only if asked for; waits for the GPU where they are there."""
        left = () if page_ids else ("block_table", "indices")
        return StepTables(*(array if array is None or name in left else arrays.to_host(name, array)
                            for name, array in zip(self._fields, self)))

    def lengths(self, page_size: int) -> np.ndarray:
        """Tokens of each row, [batch_size] int32, of tables on the host."""
        if self.seq_lens is not None:
            return self.seq_lens
        pages = np.diff(self.indptr)
        return np.where(pages > 0, (pages - 1) * page_size + self.last_page_len, 0).astype(np.int32)

    def with_lengths(
        self, views: dict[str, ArrayView], lens: np.ndarray
    ) -> tuple[StepTables, dict[str, ArrayView]]:
        """The same tables and views with seq_lens, which are `lens`, in place of last_page_len."""
        if self.last_page_len is None:
            return self, views
        tables = self._replace(seq_lens=lens, last_page_len=None)
        return tables, tables.views()

    def owned_ids(self, lens: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, places in their row, page ids) of all pages that rows of these lengths read; tables on the host."""
        counts = -(-lens.astype(np.int64) // page_size)
        rows = np.repeat(np.arange(len(lens)), counts)
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        if self.is_csr:
            return rows, places, self.indices[self.indptr[rows] + places]
        return rows, places, self.block_table[rows, places]


def fingerprint(given: tuple) -> tuple[list[int], list]:
    """(addresses, what validation depends on) of arrays in the order of StepTables, as arrays.fingerprints.

    Indices are as many as a step needs: how many is left out.
    """
    addresses, keys = arrays.fingerprints(given)
    if addresses[3]:
        dtype, device, shape, *strides = keys[3]
        keys[3] = dtype, device, len(shape), *strides
    return addresses, keys
