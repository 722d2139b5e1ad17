"""ScheduleEngine: paged decode attention on the GPU under one of the schedules of pkvsim.schedule.make."""
from __future__ import annotations

from dataclasses import replace

import cupy
import numpy as np

from gpu.engine.arguments import DecodeArguments
from gpu.engine.decode_kernels import DecodeKernels
from gpu.engine.page_lists import ListArguments
from gpu.engine.plan import Plan, place
from gpu.engine.shared_reads import AUTO, SharedReads, check_groups, check_host, groups_key
from gpu.engine.task_list import read_device_tasks, upload_tasks
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables, fingerprint
from gpu.inputs.run import Run
from gpu.kernels.this_gpu import this_gpu
from gpu.kernels.variant import TILE_TOKENS, kernel_config, reads_by_warpgroups
from pkvsim import DecodeShape, make_schedule
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.costs import (
    BalancedCosts,
    SharedCosts,
    check_costs,
    check_shared_costs,
    default_costs,
    default_shared_costs,
)
from pkvsim.schedule.make import Schedule
from pkvsim.schedule.prefixes import SharingRule, check_rule
from pkvsim.shapes import check_int, check_seq_lens

SCHEDULES = ("balanced", "workqueue", "split")
MAX_CTAS = 2**15  # the planner multiplies two range numbers in 32 bits
MAX_GRID_ROWS = 65535  # of a launch's second axis


class ScheduleEngine:
    """Decode attention for one head shape and dtype, under one schedule; gpu.DecodeEngine says what each does."""

    def __init__(self, shape: DecodeShape, dtype: str = "float16", schedule: str = "balanced", *, splits: object = 20,
                 tile_tokens: int = 32, num_ctas: int | None = None,
                 costs: BalancedCosts | None = None, variant: tuple[int, int] | None = None,
                 options: AttentionOptions = PLAIN, layout: str = "HND", scale: float | None = None,
                 shared_costs: SharedCosts | None = None, sharing_rule: SharingRule | None = None,
                 read_stages: int | None = None) -> None:
        """As gpu.DecodeEngine; schedule: one of SCHEDULES. Raises ValueError naming the argument."""
        gpu = this_gpu()
        checks.check_engine(shape, dtype, schedule, SCHEDULES, options, layout, tile_tokens, variant)
        self.shape, self.dtype, self.schedule, self.options, self.layout = shape, dtype, schedule, options, layout
        self.config = kernel_config(shape, dtype, gpu.compute_capability, variant=variant, options=options)
        # What the kernels take for KV heads: the parts of each, where its group is split.
        self._heads = replace(shape, num_kv_heads=shape.num_kv_heads * self.config.head_split)
        self.device_id = cupy.cuda.Device().id
        num_ctas = gpu.num_sms if num_ctas is None else num_ctas
        self.num_ctas = check_int("num_ctas", num_ctas, 1, MAX_CTAS)
        self.splits, self.tile_tokens = splits, tile_tokens
        if costs is None:
            costs = default_costs(divmod(gpu.compute_capability, 10)).of_kernel(
                columns=self.config.columns, v_head_dim=self.config.v_dim,
                kv_element_bytes=options.kv_element_bytes(shape), page_size=shape.page_size)
        self.costs = check_costs(costs)
        self._arguments = DecodeArguments(shape, dtype, options, layout, num_kv_heads=self._heads.num_kv_heads,
                                          scale=scale, device_id=self.device_id)
        self._capability, self._sharing = gpu.compute_capability, (
            None if shared_costs is None else check_shared_costs(shared_costs),
            None if sharing_rule is None else check_rule(sharing_rule, "sharing_rule"),
            None if read_stages is None else check_int("read_stages", read_stages, 1, checks.MAX_STAGES))
        self._lists = ListArguments(shape, self.config, self.device_id)
        self._shared: SharedReads | None = None  # of the last plan with groups
        self._shared_of: dict[int, SharedReads] = {}  # by columns of a read
        self._plan: Plan | None = None
        self._checked_plan: list | None = None
        self._in_graphs: list[tuple] = []  # what captured graphs read of the engine's own
        self._kernels = DecodeKernels(self.config, planned_on_gpu=schedule == "balanced", overlap=gpu.overlaps)
        self._partials, self._workspace_at = None, 0
        if schedule == "balanced":
            self._partials = cupy.full(self.config.workspace_bytes(self.num_ctas), 0xFF, dtype=cupy.uint8)
            self._workspace_at = self._partials.data.ptr
            cupy.cuda.get_current_stream().synchronize()  # the first run may be on another stream

    def plan(self, tables: StepTables, *, splits: object = None, packed: object = None,
             validate: bool = False, groups: object = None) -> None:
        """As gpu.DecodeEngine.plan. splits: of this plan and those to come; packed: what FlashInfer's routes read."""
        if splits is not None:
            self.splits = splits
        addresses, key = fingerprint(tables)
        key.append(groups_key(groups))
        if key == self._checked_plan and not validate and self._plan.move(tables, addresses, self.shape.page_size):
            return
        if isinstance(tables.seq_lens, (list, tuple)):
            tables = tables._replace(seq_lens=check_seq_lens(tables.seq_lens))
        views = tables.views()
        checks.check_plan(views, self.device_id)
        if any(array.device < 0 for array in views.values()):  # copies go to the current GPU
            checks.check_current(self.device_id, cupy.cuda.Device().id)
        checks.check_room(views, self._heads, segment_cost=self.costs.segment)
        shared = None
        if groups is not None:
            checks.expect("groups", f"None for schedule {self.schedule!r}", repr(groups), self.schedule == "balanced")
            rows = views["last_page_len" if "last_page_len" in views else "seq_lens"].shape[0]
            if not (isinstance(groups, str) and groups == AUTO):
                check_groups(groups, rows, self.device_id)
            shared = self._shared_reads(rows * self._heads.group_size * self.options.query_tokens)
            segment, tile = shared.most_costs()
            checks.check_room(views, self._heads, segment_cost=self.costs.segment + segment, tile_cost=tile)
        host = host_lens = None
        if self.schedule != "balanced" or validate or tables.lengths_on_host(views):
            host = tables.on_host(page_ids=validate)
            checks.check_contents(host, self.shape.page_size)
            host_lens = host.lengths(self.shape.page_size)
            if validate and groups is not None and not isinstance(groups, str):
                check_host(groups, host, host_lens, self.shape.page_size)
        library = "torch" if any(array.library == "torch" for array in views.values()) else self._arguments.library
        # On the runs' stream copies are ordered with the runs, and freed memory is not taken up before they end.
        with arrays.on_stream(library, self.device_id) as stream:
            if self.schedule == "balanced":
                plan = place(tables, views, self.shape.page_size)
            else:
                schedule = make_schedule(self.schedule, self._heads, host_lens, splits=self.splits,
                                         tile_tokens=self.tile_tokens, window=self.options.reach)
                plan = place(*tables.with_lengths(views, host_lens), self.shape.page_size)
                plan.task_list = upload_tasks(schedule, host_lens)
                self._reserve_partials(schedule)
            if shared is not None:
                plan.groups = shared.place(groups, plan, self.device_id)
            if shared is None or plan.groups is None:
                plan.decode = self._kernels.decode(plan.layout)
            else:
                plan.decode = self._kernels.shared(plan.layout, shared.config, shared.shared_bytes)
            if self._arguments.library is None:
                stream.synchronize()  # the first run may be on another stream
        if validate:
            plan.unchecked_ids = host, host_lens
        on_gpu = all(array.device >= 0 for array in views.values()) and (plan.groups is None or not plan.groups.copied)
        self._checked_plan = key if on_gpu and self.schedule == "balanced" else None
        self._plan, self._shared = plan, shared or self._shared

    def _shared_reads(self, batch_columns: int) -> SharedReads:
        """What serves groups in steps whose rows have so many query columns of a KV head together."""
        costs, rule, stages = self._sharing
        if costs is None:
            costs = default_shared_costs(
                batch_columns, row_columns=self.config.columns, value_dim=self.config.v_dim,
                by_warpgroups=reads_by_warpgroups(self.config, self._capability))
        if costs.columns not in self._shared_of:
            self._shared_of[costs.columns] = SharedReads(
                self._heads, self.config, self._capability, self.options, num_ctas=self.num_ctas, costs=costs,
                rule=rule, stages=stages)
        return self._shared_of[costs.columns]

    def _reserve_partials(self, schedule: Schedule) -> None:
        need = max(1, int(schedule.split_offsets[-1])) * self._heads.num_kv_heads * self.config.state_bytes
        if self._partials is None or self._partials.nbytes < need:
            self._partials = cupy.empty(need, dtype=cupy.uint8)
            self._workspace_at = self._partials.data.ptr

    def run(self, run: Run) -> tuple[object, object]:
        """As gpu.DecodeEngine.run."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("run: call plan() first")
        q, k_pages, v_pages, out, lse, *others, selected, page_lse = run
        if v_pages is None:
            k_pages, v_pages = arrays.split_combined(k_pages)
        if out is None or lse is None:
            heads = arrays.shape_of("q", q)[:-1]
            out = arrays.empty_like(q, (*heads, self.options.value_dim(self.shape)), self.dtype) if out is None else out
            lse = arrays.empty_like(q, heads, "float32") if lse is None else lse
        shared = plan.groups
        workspace_at = self._workspace_at if shared is None else shared.workspace_at
        given = self._arguments.take(plan, workspace_at, q, k_pages, v_pages, out, lse, *others)
        stream = arrays.current_stream(self._arguments.library, self.device_id)
        if (plan.copies or plan.task_list or shared) and not plan.in_graph and arrays.is_capturing(stream):
            self._in_graphs.append((plan.copies, plan.task_list, self._partials, shared and shared.owned))
            plan.in_graph = True
        if selected is not None or page_lse is not None:
            self._run_listed(plan, given, selected, page_lse, stream)
            return out, lse
        if shared is not None:
            if shared.finder is not None:
                self._shared.find(plan, stream)
            plan.decode(self.num_ctas, (*given, *self.costs, *self._shared.costs, *shared.arguments(), plan.max_tokens),
                        stream, pairs=True)
            return out, lse
        if plan.task_list is None:
            plan.decode(self.num_ctas, (*given, *self.costs, plan.max_tokens), stream, pairs=True)
            return out, lse
        tasks, offsets = plan.task_list.tasks, plan.task_list.split_offsets.data.ptr
        for bucket in plan.task_list.buckets:
            first = tasks.data.ptr + bucket.begin * tasks.strides[0]
            list_args = first, offsets, bucket.count, self.tile_tokens // TILE_TOKENS
            grid, pairs = self._kernels.task_grid(bucket.count, self.num_ctas)
            plan.decode(grid, (*given, *list_args), stream, pairs=pairs)
            if bucket.rows is not None:
                self._merge(given, offsets, bucket.rows, stream)
        return out, lse

    def _merge(self, given: tuple, offsets: int, rows: object, stream: int) -> None:
        """Merges the rows [num_rows] int32 that were split: in one launch, or in several of as many as a grid holds."""
        for begin in range(0, len(rows), MAX_GRID_ROWS):
            grid = self._heads.num_kv_heads, min(MAX_GRID_ROWS, len(rows) - begin)
            self._kernels.merge()(grid, (*given, offsets, rows.data.ptr + begin * rows.itemsize), stream)

    def _run_listed(self, plan: Plan, given: tuple, selected: object, page_lse: object, stream: int) -> None:
        """Launches a run with lists of pages, or with the mass of every page as a by-product."""
        for name, what in (("selected", selected), ("page_lse", page_lse)):
            checks.expect(name, f"None for schedule {self.schedule!r}", type(what).__name__,
                          what is None or self.schedule == "balanced")
        more = self._lists.take(selected, page_lse, batch_size=plan.batch_size,
                                grouped=plan.groups is not None, library=self._arguments.library)
        kernel = self._kernels.listed(plan.layout, selected=selected is not None, page_lse=page_lse is not None)
        kernel(self.num_ctas, (*given, *self.costs, plan.max_tokens, *more), stream, pairs=True)

    def release_arrays(self) -> None:
        """Lets go of the planned arrays, for a caller who keeps them alive or plans again before the next run."""
        if self._plan is not None:
            self._plan.arrays = ()

    def device_tasks(self, *, max_tasks: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """The balanced schedule as the GPU plans it: pkvsim's task array and cta_offsets [num_ctas + 1]. Synchronises.

        Where a group is split (config.head_split), its parts count as KV heads.
        """
        plan = self._plan
        if plan is None or self.schedule != "balanced":
            raise RuntimeError("device_tasks: needs a planned engine with schedule='balanced'")
        pages = (plan.row_begins, self.shape.page_size) if plan.layout.last_page else None
        return read_device_tasks(plan.lengths, plan.batch_size, self._heads.num_kv_heads, self.costs, plan.max_tokens,
                                 self.options.reach, num_ctas=self.num_ctas, max_tasks=max_tasks, last_pages=pages)
