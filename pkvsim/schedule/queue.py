"""The split and workqueue schedules: each row cut into so many splits, one CTA a task."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pkvsim.schedule.fill import fill_queue
from pkvsim.schedule.task_list import TASK_DTYPE, Schedule, offsets_of
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, describe


def check_splits(splits: int | Sequence[int] | np.ndarray | None, batch_size: int) -> np.ndarray:
    """Splits asked of each row, int64 [batch_size]."""
    if splits is None or np.ndim(splits) == 0:
        value = splits.item() if isinstance(splits, np.ndarray) else splits
        return np.full(batch_size, check_int("splits", value, 1, MAX_TOKENS), np.int64)
    array = np.asarray(splits)
    if array.shape != (batch_size,) or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"splits: expected an integer or integers [{batch_size}], got {describe(array)}")
    if array.size and array.min() < 1:
        raise ValueError(f"splits: expected counts >= 1, got {int(array.min())}")
    return array.astype(np.int64)


def queue_schedule(
    name: str, shape: DecodeShape, lens: np.ndarray, tiles: np.ndarray, asked: np.ndarray, tile_tokens: int
) -> Schedule:
    row_splits = np.minimum(asked, tiles)  # [batch_size]
    slots = int(row_splits.sum())
    num_tasks = slots * shape.num_kv_heads
    if num_tasks > MAX_TOKENS:
        raise ValueError(f"splits: expected at most {MAX_TOKENS} tasks in all, got {num_tasks}")
    tasks = np.empty((num_tasks, 5), np.int32)
    fill_queue(tiles, row_splits, shape.num_kv_heads, tasks)
    grid_ctas, num_launches, merge_launches = num_tasks, 2, 1
    if name == "split":
        used = tiles > 0
        # Rows of one length and split count share launches; both fit 31 bits.
        buckets = np.unique(lens[used].astype(np.int64) << 32 | row_splits[used])
        merge_launches = int(np.count_nonzero((buckets & 0xFFFFFFFF) > 1))
        num_launches = len(buckets) + merge_launches
        grid_ctas = int(asked[used].sum()) * shape.num_kv_heads
    return Schedule(
        name=name,
        tasks=tasks.view(TASK_DTYPE).reshape(-1),
        split_offsets=offsets_of(row_splits),
        cta_offsets=np.arange(num_tasks + 1, dtype=np.int32),
        tile_tokens=tile_tokens,
        num_launches=num_launches,
        merge_launches=merge_launches,
        num_partial_slots=slots,
        num_partial_tasks=num_tasks,
        num_ctas=num_tasks,
        grid_ctas=grid_ctas,
    )
