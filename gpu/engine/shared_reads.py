"""An engine's steps whose rows read together: kernel variant, workspace, and where a step's groups are."""
from __future__ import annotations

from typing import TYPE_CHECKING

import cupy
import numpy as np

from gpu.engine.prefixes import PrefixFinder, default_rule
from gpu.engine.step_groups import StepGroups
from gpu.inputs import arrays
from gpu.inputs.checks import expect
from gpu.kernels.variant import KernelConfig, most_readers, read_config, shared_limit_bytes
from pkvsim.options import AttentionOptions
from pkvsim.schedule import groups as host_groups
from pkvsim.schedule.costs import EIGHTHS, SharedCosts
from pkvsim.schedule.prefixes import SharingRule
from pkvsim.shapes import DecodeShape

if TYPE_CHECKING:
    from gpu.engine.plan import Plan

AUTO = "auto"
NAMES = ("group_of_row", "prefix_pages")


class SharedReads:
    """What an engine needs for them, made by its first plan with groups."""

    __slots__ = ("config", "costs", "most_readers", "rule", "shared_bytes", "_num_ctas", "_num_kv_heads", "_workspace",
                 "_make_finder", "_finder")

    def __init__(self, shape: DecodeShape, config: KernelConfig, compute_capability: int, options: AttentionOptions, *,
                 num_ctas: int, costs: SharedCosts, rule: SharingRule | None, stages: int | None) -> None:
        """Raises ValueError naming the argument with which no read can serve two rows."""
        self.config = read_config(config, compute_capability, columns=costs.columns, stages=stages)
        self.costs = costs._replace(columns=self.config.read_columns)
        self.most_readers = most_readers(self.config, compute_capability)
        self.shared_bytes = shared_limit_bytes(compute_capability)
        self._num_ctas, self._num_kv_heads, self._workspace = num_ctas, shape.num_kv_heads, None
        self.rule = default_rule(shape, options) if rule is None else rule
        self._make_finder = lambda: PrefixFinder(shape.page_size, options.query_tokens, self.rule,
                                                 shared_limit_bytes=self.shared_bytes)
        self._finder: PrefixFinder | None = None

    def place(self, groups: object, plan: Plan, device_id: int) -> StepGroups | None:
        """The groups of a step, whose tables `plan` has; "auto" are those that its runs find, or None where rows that
        fill the table could not save enough. Such a step is a plain one, in captured graphs too, whose tables have the
        same room.

        Raises ValueError naming the argument.
        """
        batch = plan.batch_size
        if isinstance(groups, str) and groups == AUTO:
            # Of CSR the room is that of all rows together, and another step's indices may be more.
            if not (plan.layout.csr or self.rule.ever_worth(batch, plan.max_tokens)):
                return None
            if self._finder is None:
                self._finder = self._make_finder()
            self._check_readers(batch + self._finder.num_groups(batch))  # before the last step's are let go
            kept = owned = self._finder.prepare(plan.layout, batch)
            copied = False
            placed, finder = self._finder.groups, self._finder
            at, num_groups = [array.data.ptr for array in placed], placed.prefix_pages.shape[0]
        else:
            views = check_groups(groups, batch, device_id)
            self._check_readers(batch + views["prefix_pages"].shape[0])
            host = [arrays.to_host(name, getattr(groups, name)) for name in NAMES if views[name].device < 0]
            if len(host) == len(NAMES):
                host_groups.PrefixGroups(*host)  # the values of what the host knows whole
            pairs = [arrays.to_gpu(name, getattr(groups, name)) for name in NAMES]
            kept, finder = tuple(array for array, _ in pairs), None
            owned = tuple(array for name, array in zip(NAMES, kept) if views[name].device < 0)
            copied = bool(owned)
            at, num_groups = [address for _, address in pairs], views["prefix_pages"].shape[0]
        workspace = self._reserve(batch)
        of_row, prefixes = at
        return StepGroups(of_row, prefixes, num_groups, workspace.data.ptr, kept, (*owned, workspace), copied, finder)

    def _check_readers(self, count: int) -> None:
        expect("groups", f"at most {self.most_readers} rows and groups together on this GPU", count,
               count <= self.most_readers)

    def most_costs(self) -> tuple[int, int]:
        """Tiles that a row's segment may cost beside BalancedCosts.segment, and plain tiles that a tile of it may.

        Of O outputs and reads that cost R, sqrt(merge * R / O) an output are at most merge * O / 2 + R / 2 together.
        """
        tile = self.costs.tile_eighths(self.costs.columns)
        return -(-self.costs.merge // 2), max(1, -(-3 * tile // (2 * EIGHTHS)))

    def _reserve(self, batch_size: int) -> object:
        """The workspace for so many rows. Its words are empty between launches, so one of more rows serves fewer."""
        need = self.config.workspace_bytes(self._num_ctas, batch_size * self._num_kv_heads)
        if self._workspace is None or self._workspace.nbytes < need:
            self._workspace = cupy.full(need, 0xFF, dtype=cupy.uint8)
        return self._workspace

    def find(self, plan: Plan, stream: int) -> None:
        """Finds the groups of a step if its finder has not: once after each plan, and once in each capture, whose
        replays find them anew."""
        step = plan.groups
        here = arrays.capture_number(stream)
        if step.found_in == here:
            return
        step.finder.find(plan.layout, page_ids=plan.page_ids, row_begins=plan.row_begins, lengths=plan.lengths,
                         stride=plan.stride, batch_size=plan.batch_size, max_tokens=plan.max_tokens, stream=stream)
        step.found_in = here


def check_groups(groups: object, batch_size: int, device_id: int) -> dict[str, arrays.ArrayView]:
    """Shapes, dtypes and places of groups that a caller gives."""
    expect("groups", 'PrefixGroups or "auto"', repr(groups), all(hasattr(groups, name) for name in NAMES))
    views = {name: arrays.view(name, getattr(groups, name)) for name in NAMES}
    for name, size in zip(NAMES, (batch_size, "num_groups")):
        array = views[name]
        expect(name, f"int32 [{size}]", array, array.dtype == "int32" and len(array.shape) == 1
               and (name != "group_of_row" or array.shape[0] == batch_size))
        expect(name, "contiguous", f"strides {array.strides}", array.strides == (1,) or array.shape[0] <= 1)
        expect(name, f"an array on the host or on cuda:{device_id}", array, array.device in (-1, device_id))
    return views


def groups_key(groups: object) -> object:
    """What a plan's groups must have in common with the last one's to pass unlooked at; their addresses beside."""
    if groups is None or isinstance(groups, str):
        return groups, ()
    addresses, keys = arrays.fingerprints(getattr(groups, name, None) for name in NAMES)
    return (tuple(keys), tuple(addresses)) if all(addresses) else (object(), ())


def check_host(groups: object, tables: object, lens: np.ndarray, page_size: int) -> None:
    """For validate=True: the rows of each group have the same ids. Copies to the host; a ValueError names others."""
    given = host_groups.PrefixGroups(*(arrays.to_host(name, getattr(groups, name)) for name in NAMES))
    if tables.is_csr:
        pages = np.diff(tables.indptr).max(initial=0)  # a longer prefix is refused for the rows' lengths
        most = min(int(given.prefix_pages.max(initial=0)), int(pages))
        table = np.zeros((len(lens), most), np.int64)
        for row, (begin, end) in enumerate(zip(tables.indptr, tables.indptr[1:])):
            ids = tables.indices[begin:end][:most]
            table[row, : len(ids)] = ids
    else:
        table = tables.block_table
    given.check(table, lens, page_size=page_size)
