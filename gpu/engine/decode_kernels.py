"""The decode kernels of one engine, one for each layout of tables that its steps come with."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gpu.engine import page_lists
from gpu.engine.arguments import VALUES
from gpu.inputs.block_tables import TableLayout
from gpu.kernels.compile import load_kernel
from gpu.kernels.variant import KernelConfig
from pkvsim.schedule.costs import BalancedCosts, SharedCosts

if TYPE_CHECKING:
    from gpu.kernels.launch import Kernel

# The values of a launch, in order: those of the run (gpu.engine.arguments), then the kernel's own.
BALANCED_VALUES = (*VALUES, *BalancedCosts._fields, "max_tokens")
LISTED_VALUES = (*BALANCED_VALUES, *page_lists.VALUES)
SHARED_VALUES = (
    *VALUES, *BalancedCosts._fields, *SharedCosts._fields, "group_of_row", "prefix_pages", "num_groups", "max_tokens",
)  # fmt: skip
TASKS_VALUES = (*VALUES, "tasks", "split_offsets", "num_tasks", "tile_scale")
MERGE_VALUES = (*VALUES, "split_offsets", "rows")


class DecodeKernels:
    """Compiled when they are first asked for."""

    __slots__ = ("_config", "_planned_on_gpu", "_overlap", "_decode", "_merge", "_shared", "_listed")

    def __init__(self, config: KernelConfig, *, planned_on_gpu: bool, overlap: bool) -> None:
        """planned_on_gpu: the balanced schedule. overlap: see gpu.kernels.compile.load_kernel."""
        self._config, self._planned_on_gpu, self._overlap = config, planned_on_gpu, overlap
        self._decode: dict[TableLayout, Kernel] = {}
        self._shared: dict[tuple[TableLayout, int], Kernel] = {}  # and by columns of a read
        self._listed: dict[tuple[TableLayout, bool, bool], Kernel] = {}
        self._merge: Kernel | None = None

    def decode(self, layout: TableLayout) -> Kernel:
        """Takes BALANCED_VALUES, or TASKS_VALUES where the host plans."""
        if layout not in self._decode:
            file, name, values = (
                ("balanced.cu", "pkv_decode_balanced", BALANCED_VALUES) if self._planned_on_gpu
                else ("decode.cu", "pkv_decode_tasks", TASKS_VALUES)
            )  # fmt: skip
            self._decode[layout] = load_kernel(
                file, name, self._config.defines() | layout.defines(), threads=self._config.threads,
                shared_bytes=self._config.shared_bytes, overlap=self._overlap, given=values)
        return self._decode[layout]

    def listed(self, layout: TableLayout, *, selected: bool, page_lse: bool) -> Kernel:
        """Takes LISTED_VALUES. selected: of listed pages alone. page_lse: with the mass of every tile."""
        key = layout, selected, page_lse
        if key not in self._listed:
            file, name = (
                ("selected.cu", "pkv_decode_selected") if selected else ("balanced.cu", "pkv_decode_balanced")
            )  # fmt: skip
            defines = self._config.selected_defines(selected=selected, page_lse=page_lse) | layout.defines()
            self._listed[key] = load_kernel(
                file, name, defines, threads=self._config.threads, shared_bytes=self._config.shared_bytes,
                overlap=self._overlap, given=LISTED_VALUES)
        return self._listed[key]

    def shared(self, layout: TableLayout, config: KernelConfig, shared_bytes: int) -> Kernel:
        """Takes SHARED_VALUES. config: with reads for several rows."""
        key = layout, config.read_columns
        if key not in self._shared:
            self._shared[key] = load_kernel(
                "shared.cu", "pkv_decode_shared", config.read_defines() | layout.defines(), threads=config.threads,
                shared_bytes=shared_bytes, overlap=self._overlap, given=SHARED_VALUES)
        return self._shared[key]

    def merge(self) -> Kernel:
        """Takes MERGE_VALUES."""
        if self._merge is None:
            self._merge = load_kernel("merge.cu", "pkv_merge", self._config.defines(), threads=self._config.threads,
                                      overlap=self._overlap, given=MERGE_VALUES)
        return self._merge

    def task_grid(self, num_tasks: int, num_ctas: int) -> tuple[int, bool]:
        """(CTAs, whether they go in pairs) of a launch of so many tasks on a GPU of so many CTAs.

        Two neighbouring SMs share their way to memory, which one of them fills alone. So where tasks are for at most
        half the CTAs, one CTA of each pair has a task and the other none (pkv_decode_tasks deals them out so), on GPUs
        with clusters; left to itself the GPU would put some tasks on one pair by chance.
        """
        if self._overlap and 0 < 2 * num_tasks <= num_ctas:
            return 2 * num_tasks, True
        return max(1, min(num_ctas, num_tasks)), False
