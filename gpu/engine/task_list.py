"""Task lists on the GPU: host-planned schedules as it reads them, and the one that it plans as it lists it."""
from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from gpu.kernels.compile import load_kernel
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.make import TASK_DTYPE, Schedule


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


def read_device_tasks(seq_lens: int, batch_size: int, num_kv_heads: int, costs: BalancedCosts, max_tokens: int,
                      reach: int | None, *, num_ctas: int, max_tasks: int,
                      last_pages: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The balanced schedule as the GPU plans it: tasks TASK_DTYPE and cta_offsets [num_ctas + 1]. Synchronises.

    seq_lens: address of [batch_size] int32; reach: AttentionOptions.reach.
    last_pages: where seq_lens are last_page_len instead, the address of indptr and the page size.
    Raises ValueError when a range has more than max_tasks.
    """
    indptr, page_size = last_pages or (0, 1)
    defines = {"WINDOWED": int(reach is not None)}
    if last_pages:
        defines |= {"LAST_PAGE_LENGTHS": 1, "PAGE_SIZE": page_size}
    kernel = load_kernel("plan.cu", "pkv_list_balanced", defines, threads=32)
    listed = cupy.empty((num_ctas, max_tasks, 5), dtype=cupy.int32)
    counts = cupy.empty(num_ctas, dtype=cupy.int32)
    kernel(num_ctas, (seq_lens, batch_size, num_kv_heads, *costs, max_tokens, reach or 0, listed.data.ptr, max_tasks,
                      counts.data.ptr, indptr), cupy.cuda.get_current_stream().ptr)
    counts = counts.get()
    if counts.max(initial=0) > max_tasks:
        raise ValueError(f"max_tasks: expected at least {int(counts.max())}, got {max_tasks}")
    counts = counts[:max(1, len(np.trim_zeros(counts, "b")))]  # CTAs past the last range idle
    rows = np.concatenate([np.empty((0, 5), np.int32), *(block[:n] for block, n in zip(listed.get(), counts))])
    tasks = np.ascontiguousarray(rows).view(TASK_DTYPE).reshape(-1)
    return tasks, np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
