"""What DecodeEngine.plan() leaves for run()."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu.engine.task_list import TaskList
from gpu.inputs import arrays
from gpu.inputs.arrays import ArrayView
from gpu.inputs.block_tables import StepTables, TableLayout
from pkvsim.shapes import MAX_TOKENS

if TYPE_CHECKING:
    from gpu.engine.step_groups import StepGroups
    from gpu.kernels.launch import Kernel


@dataclass(slots=True)
class Plan:
    """A planned step.

    `arrays` are the caller's, kept alive behind their addresses. `copies` are the engine's own, of what was on the
    host: as task_list, nothing but the plan keeps them.
    """

    arrays: tuple  # in the order of StepTables
    layout: TableLayout
    lengths: int  # address, [batch_size] int32: seq_lens or last_page_len
    page_ids: int  # address, [batch_size, stride]; of CSR [stride]
    row_begins: int  # of CSR the address of indptr, [batch_size + 1] int32; else 0
    batch_size: int
    stride: int  # elements from one row of a block table to the next; the indices of CSR
    max_tokens: int  # that a row of the table has room for; lengths beyond are cut to it
    copies: tuple = ()
    decode: Kernel | None = None
    groups: StepGroups | None = None  # of rows that read together; decode is then the kernel that does so
    task_list: TaskList | None = None
    unchecked_ids: tuple[StepTables, np.ndarray] | None = None  # on the host, with lengths, to check at the next run
    in_graph: bool = False  # a captured graph reads the copies and the task list
    checked_indices: int = 0  # of CSR, those that the planner is known to be able to count

    def move(self, given: tuple, addresses: list[int], page_size: int) -> bool:
        """To other arrays that are alike and on the GPU, as these are; of CSR the indices may be more or fewer.

        False, and nothing is moved, where there are more of them than are known to be few enough.
        """
        seq_lens, block_table, indptr, indices, last_page_len = addresses
        if self.layout.csr:
            num_indices = given[3].shape[0]
            if num_indices > self.checked_indices:
                return False
            self.page_ids, self.row_begins, self.stride = indices, indptr, num_indices
            self.max_tokens = most_tokens(num_indices, page_size)
            self.lengths = last_page_len if self.layout.last_page else seq_lens
        else:
            self.lengths, self.page_ids = seq_lens, block_table
        self.arrays, self.unchecked_ids = given, None
        if self.groups is not None:
            self.groups.found_in = None
        return True


def place(given: StepTables, views: dict[str, ArrayView], page_size: int) -> Plan:
    """The plan of checked arrays, `views` their description; those on the host are copied to the current GPU."""
    layout = given.layout(views)
    placed = {name: arrays.to_gpu(name, getattr(given, name)) for name in views}
    at = {name: address for name, (_, address) in placed.items()}
    ids = views["indices" if layout.csr else "block_table"]
    num_pages = ids.shape[-1]
    batch_size = views["indptr"].shape[0] - 1 if layout.csr else ids.shape[0]
    # A copy of a table on the host is contiguous, whatever the table was a view of.
    strided = not layout.csr and ids.device >= 0 and batch_size > 1
    return Plan(
        arrays=given, layout=layout, lengths=at["last_page_len" if layout.last_page else "seq_lens"],
        page_ids=at["indices" if layout.csr else "block_table"], row_begins=at["indptr"] if layout.csr else 0,
        batch_size=batch_size, stride=ids.strides[0] if strided else num_pages,
        max_tokens=most_tokens(num_pages, page_size), checked_indices=num_pages,
        copies=tuple(array for name, (array, _) in placed.items() if views[name].device < 0))


def most_tokens(num_pages: int, page_size: int) -> int:
    """Tokens that so many pages of a row have room for."""
    return min(MAX_TOKENS, num_pages * page_size)
