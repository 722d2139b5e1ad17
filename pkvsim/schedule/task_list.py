"""What a schedule is: a step's tasks, and where each partial state goes."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

READ_DTYPE = np.dtype([(name, np.int32) for name in ("group", "tiles", "member_begin", "member_end", "parts")])
TASK_DTYPE = np.dtype([(name, np.int32) for name in ("row", "kv_head", "split", "tile_begin", "tile_end")])


@dataclass(frozen=True, slots=True, eq=False)
class SharedReads:
    """What a step reads once for several rows (pkvsim.schedule.spans).

    Read i holds tiles [0, reads["tiles"][i]) of every KV head and serves members[member_begin:member_end], rows in
    ascending order. A task of a read has the first member's row, through whose pages it reads, and leaves a state for
    every member; parts is the most tasks that any KV head of the read is cut into.
    """

    reads: np.ndarray  # [num_reads] READ_DTYPE
    members: np.ndarray  # [num_members] int32 rows, read by read
    read_of_row: np.ndarray  # [batch_size] int32, -1 where a row reads all its tiles itself
    read_of_task: np.ndarray  # [num_tasks] int32, -1 where a task reads for its own row alone

    def members_of(self, read: int) -> np.ndarray:
        """Rows that a read serves, int32."""
        return self.members[self.reads["member_begin"][read] : self.reads["member_end"][read]]

    def members_of_tasks(self) -> np.ndarray:
        """Rows that each task reads for, each of which it leaves a state, int64 [num_tasks]."""
        served = (self.reads["member_end"] - self.reads["member_begin"]).astype(np.int64)
        return np.where(self.read_of_task < 0, 1, np.append(served, 1)[self.read_of_task])

    def shared_parts(self) -> np.ndarray:
        """Slots that a row's states of its read take, before those of its own tasks: int64 [batch_size]."""
        return parts_of_rows(self.reads, self.read_of_row)


def parts_of_rows(reads: np.ndarray, read_of_row: np.ndarray) -> np.ndarray:
    """`parts` of each row's read, 0 where it has none: int64 [batch_size]."""
    return np.where(read_of_row < 0, 0, np.append(reads["parts"], 0)[read_of_row]).astype(np.int64)


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

    With `shared` some tasks read for several rows. A member's slots are then first those of its read's parts, in their
    order, and from split_offsets[row] + shared.shared_parts()[row] on those of its own tasks; num_partial_tasks counts
    the states of all members. A member that has no tiles of its own has one task of none under balanced, which merges.
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
    shared: SharedReads | None = None


def offsets_of(row_splits: np.ndarray) -> np.ndarray:
    """Where each row's slots begin, int32 [batch_size + 1], of so many slots [batch_size]."""
    offsets = np.zeros(len(row_splits) + 1, np.int32)
    np.cumsum(row_splits, out=offsets[1:])
    return offsets
