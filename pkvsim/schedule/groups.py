"""Which rows of a batch have their leading pages in common."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int, check_seq_lens, describe


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGroups:
    """Rows that share leading pages: their block tables begin with the same ids.

    group_of_row: [batch_size] int32, the row's group or -1. prefix_pages: [num_groups] int32, full pages that all rows
    of the group have in common, 0 where a group is unused. Any integer arrays or lists are taken. Raises ValueError
    naming the field.
    """

    group_of_row: np.ndarray
    prefix_pages: np.ndarray

    def __post_init__(self) -> None:
        pages = _integers("prefix_pages", "num_groups", self.prefix_pages, 0, MAX_TOKENS)
        groups = _integers("group_of_row", "batch_size", self.group_of_row, -1, len(pages) - 1)
        object.__setattr__(self, "prefix_pages", pages)
        object.__setattr__(self, "group_of_row", groups)

    def members(self, seq_lens: np.ndarray, *, page_size: int, tile_tokens: int, query_tokens: int) -> np.ndarray:
        """The group that each row reads its leading tiles with, int64 [batch_size], or -1.

        A row reads with its group if the prefix is a tile or more, all of the row's query tokens see all of it, and
        another row does so too. The others read alone, so a length that is too short costs speed and no result.
        seq_lens [batch_size] integers. Raises ValueError when they are of another batch.
        """
        if len(seq_lens) != len(self.group_of_row):
            raise ValueError(f"groups: expected group_of_row [{len(seq_lens)}], got [{len(self.group_of_row)}]")
        tokens = self.prefix_pages.astype(np.int64) * page_size  # [num_groups]
        prefix = np.append(tokens, 0)[self.group_of_row]  # [batch_size]
        reads = (prefix >= tile_tokens) & (prefix <= np.asarray(seq_lens, np.int64) - (query_tokens - 1))
        group = np.where(reads, self.group_of_row, -1).astype(np.int64)
        count = np.bincount(group + 1, minlength=len(tokens) + 1)
        return np.where(count[group + 1] >= 2, group, -1)

    def check(self, block_table: np.ndarray, seq_lens: Any, *, page_size: int) -> None:
        """ValueError unless every row of a group is as long as the prefix, and has the page ids that the first has.

        block_table [batch_size, max_pages], seq_lens [batch_size] integers.
        """
        lens, page_size = check_seq_lens(seq_lens), check_int("page_size", page_size, 1)
        if len(lens) != len(self.group_of_row):
            raise ValueError(f"groups: expected group_of_row [{len(lens)}], got [{len(self.group_of_row)}]")
        block_table = np.asarray(block_table)
        if block_table.ndim != 2 or len(block_table) != len(lens):
            raise ValueError(f"block_table: expected integers [{len(lens)}, max_pages], got {describe(block_table)}")
        for group, pages in enumerate(self.prefix_pages.tolist()):
            rows = np.flatnonzero(self.group_of_row == group)
            short = rows[lens[rows] < pages * page_size]
            if len(short):
                raise ValueError(
                    f"prefix_pages[{group}]: expected at most the {lens[short[0]] // page_size} full pages of row "
                    f"{short[0]}, got {pages}"
                )
            differs = block_table[rows, :pages] != block_table[rows[:1], :pages]
            if differs.any():
                at, column = (int(i) for i in np.argwhere(differs)[0])
                want, got = block_table[rows[0], column], block_table[rows[at], column]
                raise ValueError(
                    f"group_of_row[{rows[at]}]: expected the page ids of row {rows[0]} in all {pages} columns of group "
                    f"{group}, got {got} for {want} in column {column}"
                )


def _integers(name: str, length: str, given: Any, low: int, high: int) -> np.ndarray:
    array = np.asarray(given)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers [{length}], got {describe(array)}")
    bad = np.flatnonzero((array < low) | (array > high))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}]: expected a value in [{low}, {high}], got {array[bad[0]]}")
    return array.astype(np.int32, copy=False)
