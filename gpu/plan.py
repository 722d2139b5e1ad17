"""What DecodeEngine.plan() leaves for run()."""
from __future__ import annotations

from dataclasses import dataclass

from gpu.task_list import TaskList


@dataclass(slots=True)
class Plan:
    """A planned step. `arrays` keeps seq_lens and block_table alive behind their addresses."""

    arrays: tuple
    seq_lens: int  # address, [batch_size] int32
    block_table: int  # address, [batch_size, table_stride] int32
    batch_size: int
    table_stride: int  # elements from one row of the table to the next
    max_tokens: int  # that the table has room for; lengths beyond are cut to it
    task_list: TaskList | None = None
    unchecked_ids: tuple | None = None  # (block_table, seq_lens) on the host, to check at the next run
