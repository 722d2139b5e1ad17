"""The schedules planned on the host (split, workqueue) as the GPU reads them."""
from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from pkvsim.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Bucket:
    """One decode launch and its merge: tasks [begin, begin + count) of the list, rows to merge (None: no merge)."""

    begin: int
    count: int
    rows: object | None  # [num_rows] int32, CuPy


@dataclass(frozen=True, slots=True)
class TaskList:
    """The host-planned schedules on the GPU, as CuPy arrays."""

    tasks: object  # [num_tasks, 5] int32
    split_offsets: object  # [batch_size + 1] int32
    buckets: tuple[Bucket, ...]


def upload_tasks(schedule: Schedule, lens: np.ndarray) -> TaskList:
    """Copies a schedule of seq_lens [batch_size] int32 to the current GPU, in the order of its launches."""
    tasks, rows = schedule.tasks, np.arange(len(lens), dtype=np.int32)
    # The split schedule launches once for every distinct length; the workqueue once for all rows.
    keys = lens[tasks["row"]] if schedule.name == "split" else np.zeros(len(tasks), np.int32)
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1)) if len(tasks) else np.zeros(1, np.int64)
    buckets = []
    for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist()):
        chosen = rows if schedule.name == "workqueue" else np.unique(tasks["row"][order[begin:end]]).astype(np.int32)
        merges = (np.diff(schedule.split_offsets)[chosen] > 1).any()
        buckets.append(Bucket(begin, end - begin, cupy.asarray(chosen) if merges else None))
    # Without a task one launch still writes the zeros of the empty rows.
    return TaskList(cupy.asarray(np.ascontiguousarray(tasks[order]).view(np.int32).reshape(-1, 5)),
                    cupy.asarray(schedule.split_offsets), tuple(buckets) or (Bucket(0, 0, None),))
