"""What a schedule is: a step's tasks, and where each partial state goes."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TASK_DTYPE = np.dtype([(name, np.int32) for name in ("row", "kv_head", "split", "tile_begin", "tile_end")])


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A step's task list, and where each partial state goes.

    The partial of a task belongs in slot `split_offsets[row] + split` of its KV head, and partials of
    a (row, KV head) merge in the order of `split`.

    split, workqueue: one task per CTA, row r in `split_offsets[r + 1] - split_offsets[r]` splits on
    every KV head. num_partial_slots is the sum of the rows' splits, single ones included, as the paper
    counts; num_partial_tasks is that times the KV heads.
    balanced: range i is tasks [cta_offsets[i], cta_offsets[i + 1]). Heads held by one range write their
    output directly, so num_partial_tasks counts only the tasks of heads that are cut;
    num_partial_slots is ceil(num_partial_tasks / num_kv_heads), and split_offsets leaves a row room for
    its most cut head.
    """

    name: str
    tasks: np.ndarray  # [num_tasks] TASK_DTYPE, queue order, tile_end exclusive
    split_offsets: np.ndarray  # [batch_size + 1] int32
    cta_offsets: np.ndarray  # [num_ctas + 1] int32
    tile_tokens: int
    num_launches: int
    merge_launches: int
    num_partial_slots: int
    num_partial_tasks: int
    num_ctas: int
    grid_ctas: int  # decode CTAs launched, those with no task included (split's dense grid)


def offsets_of(row_splits: np.ndarray) -> np.ndarray:
    """Where each row's slots begin, int32 [batch_size + 1], of so many slots [batch_size]."""
    offsets = np.zeros(len(row_splits) + 1, np.int32)
    np.cumsum(row_splits, out=offsets[1:])
    return offsets
