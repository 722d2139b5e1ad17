"""Rows whose pages begin alike: told by the caller, or found on the GPU in one small launch."""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cupy

from gpu.inputs import arrays
from gpu.inputs.block_tables import StepTables, TableLayout
from gpu.inputs.checks import check_plan, expect
from gpu.kernels import variant
from gpu.kernels.compile import load_kernel
from gpu.kernels.this_gpu import this_gpu
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.prefixes import SharingRule, check_rule, sharing_rule
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int

if TYPE_CHECKING:
    from gpu.kernels.launch import Kernel

WARPS = 16  # of a CTA of pkv_find_prefixes
ROW_BYTES = 56  # of its shared memory: pkv::PrefixMemory::INTS
LEAST_ROWS = 256  # that every launch has room for; one that has room for more runs on fewer CTAs of an SM
# An H200's (examples/results/h200_decode.md). On a slower GPU bytes are worth more against the merge, so the rule
# shares less there than would pay.
RULE_GB_PER_S = 4000.0


class PrefixGroups(NamedTuple):
    """Rows that share leading pages: their block tables begin with the same ids.

    group_of_row [batch_size] int32: the row's group, or -1. prefix_pages [num_groups] int32: full pages that all rows
    of the group have in common; 0 where a group is unused. NumPy, CuPy or torch.
    """

    group_of_row: object
    prefix_pages: object


def default_rule(shape: DecodeShape, options: AttentionOptions = PLAIN) -> SharingRule:
    """When groups that are found on the GPU are worth reading together."""
    return sharing_rule(shape, bandwidth_gb_per_s=RULE_GB_PER_S, options=options)


class PrefixFinder:
    """Finds the groups of steps of one page size. Its buffers are its own, and a captured graph reads them."""

    __slots__ = ("page_size", "query_tokens", "rule", "groups", "_workspace", "_kernels", "_most_rows")

    def __init__(self, page_size: int, query_tokens: int, rule: SharingRule, *, shared_limit_bytes: int) -> None:
        self.page_size, self.query_tokens, self.rule = page_size, query_tokens, rule
        self.groups: PrefixGroups | None = None
        self._workspace: object = None
        self._kernels: dict[tuple[TableLayout, int], Kernel] = {}  # and by rows that it has room for
        self._most_rows = min(2**14, shared_limit_bytes // ROW_BYTES)

    def prepare(self, layout: TableLayout, batch_size: int) -> tuple:
        """Compiles, and makes room for a step's groups; returns what a graph that captures find() must keep.

        Raises ValueError naming groups where the GPU has no room for so many rows.
        """
        expect("groups", f"at most {self._most_rows} rows where they are found on this GPU", batch_size,
               batch_size <= self._most_rows)
        key = layout, self._room(batch_size)
        if key not in self._kernels:
            defines = layout.defines() | {"PAGE_SIZE": self.page_size, "WARPS": WARPS}
            self._kernels[key] = load_kernel(
                "prefixes.cu", "pkv_find_prefixes", defines, threads=WARPS * 32, shared_bytes=ROW_BYTES * key[1],
                overlap=this_gpu().overlaps)
        if self.groups is None or self.groups.group_of_row.shape[0] != batch_size:
            self.groups = PrefixGroups(cupy.full(batch_size, -1, dtype=cupy.int32),
                                       cupy.zeros(self.num_groups(batch_size), dtype=cupy.int32))
            self._workspace = cupy.zeros(4 * batch_size, dtype=cupy.int32)  # two pkv::Links a row, of 64 bits
        return *self.groups, self._workspace

    @staticmethod
    def num_groups(batch_size: int) -> int:
        """That there is room for in a step of so many rows."""
        return max(1, batch_size // 2)

    def _room(self, batch_size: int) -> int:
        """Rows that the launch for so many has room for."""
        return min(self._most_rows, max(LEAST_ROWS, 1 << (batch_size - 1).bit_length()))

    def find(self, layout: TableLayout, *, page_ids: int, row_begins: int, lengths: int, stride: int, batch_size: int,
             max_tokens: int, stream: int) -> None:  # fmt: skip
        """Launches on a stream; the arrays are addresses, as gpu.engine.plan.Plan has them."""
        group_of_row, prefix_pages = self.groups
        self._kernels[layout, self._room(batch_size)](batch_size, (
            page_ids, row_begins, lengths, stride, 2**31 - 1, batch_size, max_tokens, self.query_tokens, *self.rule,
            group_of_row.data.ptr, prefix_pages.data.ptr, self._workspace.data.ptr), stream)  # fmt: skip


def find_prefixes(
    block_table: object, seq_lens: object, *, page_size: int, query_tokens: int = 1,
    rule: SharingRule = SharingRule(), finder: PrefixFinder | None = None,  # noqa: B008
) -> PrefixGroups:  # fmt: skip
    """The groups of a step, CuPy arrays on the GPU, as pkvsim.schedule.prefixes.find_prefixes finds them.

    block_table [batch_size, max_pages] int32 or int64, rows contiguous, and seq_lens [batch_size] int32 on the current
    GPU. One launch on the caller's current stream. finder: of an earlier call, whose arrays are then written again,
    which a captured graph needs; page_size, query_tokens and rule are its own then.
    Raises ValueError naming the argument.
    """
    device = cupy.cuda.Device()
    views = StepTables(seq_lens, block_table).views()
    check_plan(views, device.id)
    for name, array in views.items():
        expect(name, f"an array on cuda:{device.id}", array, array.device == device.id)
    table, lens = views["block_table"], views["seq_lens"]
    batch_size, max_pages = table.shape
    layout = TableLayout(int64=table.dtype == "int64")
    if finder is None:
        page_size, query_tokens = check_int("page_size", page_size, 1, 256), check_int("query_tokens", query_tokens, 1)
        finder = PrefixFinder(page_size, query_tokens, check_rule(rule), shared_limit_bytes=_shared_limit())
    with arrays.on_stream(table.library, device.id):
        finder.prepare(layout, batch_size)
    finder.find(layout, page_ids=table.pointer, row_begins=0, lengths=lens.pointer,
                stride=table.strides[0] if batch_size > 1 else max_pages, batch_size=batch_size,
                max_tokens=min(MAX_TOKENS, max_pages * finder.page_size),
                stream=arrays.current_stream(table.library, device.id))
    return finder.groups


def _shared_limit() -> int:
    return variant.shared_limit_bytes(this_gpu().compute_capability)
