"""Selected pages: for each (row, KV head) a list of the row's pages, which is all that this head reads in a step.

A list is a span of one member (pkvsim.schedule.spans): as many tiles as its pages have, in their order. The balanced
schedule takes each list for a row of its own with one KV head, of count * page_size tokens: number row * num_kv_heads +
head. What follows is then said by make_schedule, the rules for equal rows and pairs of SMs included; the device planner
(cuda_src/list_plan.cuh) equals it. Pages are counted whole, since the last page's tokens are known only when the last
place is: the cut counts tiles past them, which the tasks then leave out, and a task of no other tiles stays empty.

A list never has more pages than the row: its count is cut to them and to max_selected, so that a row of length 0 reads
nothing whatever its lists say.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.make import FREE, make_schedule
from pkvsim.schedule.task_list import Schedule
from pkvsim.shapes import DecodeShape, check_seq_lens, describe


class PageList(NamedTuple):
    """The lists of a step, arrays of any library.

    pages [batch_size, num_kv_heads, max_selected] int32: places in the row (columns of its block table), ascending and
    each once; entries from counts on mean nothing. counts [batch_size, num_kv_heads] int32.
    """

    pages: Any
    counts: Any


def check_lists(lists: PageList, shape: DecodeShape, seq_lens: Any) -> tuple[np.ndarray, np.ndarray]:
    """(pages, counts) of lists on the host, counts cut to the rows' pages.

    Raises ValueError naming the field that is of another step, or whose listed places do not ascend within the row.
    """
    lens = check_seq_lens(seq_lens)
    pages, counts = np.asarray(lists.pages), np.asarray(lists.counts)
    heads = len(lens), shape.num_kv_heads
    if pages.ndim != 3 or pages.shape[:2] != heads or pages.dtype.kind not in "iu":
        raise ValueError(f"pages: expected integers {[*heads, 'max_selected']}, got {describe(pages)}")
    if counts.shape != heads or counts.dtype.kind not in "iu":
        raise ValueError(f"counts: expected integers {list(heads)}, got {describe(counts)}")
    counts = listed_pages(counts, pages.shape[2], lens, shape.page_size)
    row_pages = (-(-lens.astype(np.int64) // shape.page_size))[:, None, None]
    listed = np.arange(pages.shape[2]) < counts[..., None]
    wrong = listed & ((pages < 0) | (pages >= row_pages))
    wrong[..., 1:] |= listed[..., 1:] & (pages[..., 1:] <= pages[..., :-1])
    if wrong.any():
        row, head, at = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"pages[{row}, {head}, {at}]: expected a place above the one before, below the row's "
            f"{int(row_pages[row, 0, 0])} pages, got {pages[row, head, at]}"
        )
    return pages.astype(np.int32, copy=False), counts


def listed_pages(counts: np.ndarray, max_selected: int, lens: np.ndarray, page_size: int) -> np.ndarray:
    """Pages that each list holds, int64 [batch_size, num_kv_heads]: counts cut to what there is."""
    row_pages = -(-lens.astype(np.int64) // page_size)
    return np.clip(counts.astype(np.int64), 0, np.minimum(max_selected, row_pages)[:, None])


def list_tokens(lists: PageList, shape: DecodeShape, seq_lens: Any) -> np.ndarray:
    """Tokens that each list reads, int64 [batch_size, num_kv_heads]: all of its pages', of a row's last page the rest.

    Raises ValueError as check_lists.
    """
    pages, counts = check_lists(lists, shape, seq_lens)
    lens = check_seq_lens(seq_lens).astype(np.int64)[:, None]
    row_pages = -(-lens // shape.page_size)
    last = np.take_along_axis(pages, np.maximum(0, counts - 1)[..., None], axis=2)[..., 0]
    missing = row_pages * shape.page_size - lens  # tokens that the row's last page has room for yet
    return counts * shape.page_size - np.where((counts > 0) & (last == row_pages - 1), missing, 0)


def list_shape(shape: DecodeShape) -> DecodeShape:
    """The shape of a list as a row of its own."""
    return replace(shape, num_q_heads=shape.group_size, num_kv_heads=1)


def list_schedule(
    lists: PageList,
    shape: DecodeShape,
    seq_lens: Sequence[int] | np.ndarray,
    *,
    tile_tokens: int = 16,
    num_ctas: int,
    costs: BalancedCosts = FREE,
) -> Schedule:
    """The balanced schedule of a step's lists: row v of its tasks is KV head v % num_kv_heads of row v // num_kv_heads,
    and tiles count through the list. Raises ValueError naming the argument."""
    _, counts = check_lists(lists, shape, seq_lens)
    tokens = (counts * shape.page_size).reshape(-1)
    schedule = make_schedule(
        "balanced", list_shape(shape), tokens, tile_tokens=tile_tokens, num_ctas=num_ctas, costs=costs
    )
    tasks = schedule.tasks
    tiles = -(-list_tokens(lists, shape, seq_lens).reshape(-1)[tasks["row"]] // tile_tokens)
    tasks["tile_end"] = np.maximum(tasks["tile_begin"], np.minimum(tasks["tile_end"], tiles))
    return schedule
