"""DecodeEngine: paged decode attention on the GPU, under any of the schedules of pkvsim.schedule.make."""
from __future__ import annotations

from dataclasses import replace

import cupy
import numpy as np

from gpu.engine.arguments import DecodeArguments
from gpu.engine.decode_kernels import DecodeKernels
from gpu.engine.plan import Plan, place
from gpu.engine.shared_reads import SharedReads, check_host, groups_key
from gpu.engine.task_list import read_device_tasks, upload_tasks
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables, fingerprint
from gpu.kernels.variant import TILE_TOKENS, kernel_config
from gpu.routes.router import Router
from pkvsim import DecodeShape, make_schedule
from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.costs import BalancedCosts, SharedCosts, check_costs, default_costs
from pkvsim.schedule.make import Schedule
from pkvsim.schedule.prefixes import SharingRule
from pkvsim.shapes import check_int, check_seq_lens

SCHEDULES = ("balanced", "workqueue", "split", "auto")
MAX_CTAS = 2**15  # the planner multiplies two range numbers in 32 bits


class DecodeEngine:
    """Decode attention for one head shape and dtype.

    schedule "balanced" plans on the GPU: plan() only notes where the arrays are, lengths and tables may change in
    place between runs (also inside a captured CUDA graph), and each run is one launch. "workqueue" and "split" plan
    on the host as the paper does. "auto" prices every route of the step, FlashInfer's included, and takes the cheapest
    where the host knows the lengths, balanced where only the GPU does: gpu.routes.router.Router says how.

    plan() and run() belong on one stream: runs share the engine's workspace. Use an engine per stream. An engine must
    live as long as the graphs that captured its runs; it keeps for them what it copied or allocated itself.
    """

    def __init__(self, shape: DecodeShape, dtype: str = "float16", schedule: str = "balanced", *, splits: object = 20,
                 tile_tokens: int = 32, num_ctas: int | None = None,
                 costs: BalancedCosts | None = None, variant: tuple[int, int] | None = None,
                 options: AttentionOptions = PLAIN, kv_dtype: str | None = None, kv_scales: str | None = None,
                 layout: str = "HND", scale: float | None = None, device: DeviceSpec | str | None = None,
                 layers: int = 1, shared_costs: SharedCosts | None = None, sharing_rule: SharingRule | None = None,
                 read_stages: int | None = None) -> None:
        """
        shape: the head shape; dtype: "float16" or "bfloat16"; schedule: one of SCHEDULES.
        splits: sequence splits per row, an int or one per row (workqueue, split). tile_tokens: tokens per tile of
        those schedules, a multiple of 16. num_ctas: CTAs of a launch, by default one per SM. costs: of the balanced
        schedule, by default what was measured for this GPU and kernel. variant: (warps, stages) of the kernel, stages
        being tiles under way for each warp, by default the table's for this GPU (gpu.tune).
        scale: of the logits, by default head_dim ** -0.5.
        options: windows, sinks, the cache's type and the like. kv_dtype, kv_scales: those of the options, where these
        have none. layout: "HND", pages [num_kv_heads, page_size, head_dim], or "NHD", [page_size, num_kv_heads,
        head_dim]; pages may be any view with those axes whose last one is contiguous.
        device, layers: of auto, the calibrated GPU to price for (Router) and how many runs a plan serves; auto chooses
        splits and costs itself.
        shared_costs, sharing_rule, read_stages: of steps planned with groups (pkvsim.schedule.spans): what reads for
        several rows cost and how many columns one serves; which groups that are found are worth reading together; tiles
        in each of their rings. By default what was calculated for this GPU and kernel.

        Raises ValueError naming the argument when it is out of range or no kernel serves the shape on this GPU.
        """
        current = cupy.cuda.Device()
        capability = int(current.compute_capability)
        checks.check_engine(shape, dtype, schedule, SCHEDULES, options, layout, tile_tokens, variant)
        options = options.with_cache(kv_dtype, kv_scales)
        self.shape, self.dtype, self.schedule, self.options, self.layout = shape, dtype, schedule, options, layout
        self.config = kernel_config(shape, dtype, capability, variant=variant, options=options)
        # What the kernels take for KV heads: the parts of each, where its group is split.
        self._heads = replace(shape, num_kv_heads=shape.num_kv_heads * self.config.head_split)
        self.device_id = current.id
        num_ctas = current.attributes["MultiProcessorCount"] if num_ctas is None else num_ctas
        self.num_ctas = check_int("num_ctas", num_ctas, 1, MAX_CTAS)
        self.splits, self.tile_tokens = splits, tile_tokens
        if costs is None:
            costs = default_costs(divmod(capability, 10)).of_kernel(
                columns=self.config.columns, v_head_dim=self.config.v_dim,
                kv_element_bytes=options.kv_element_bytes(shape), page_size=shape.page_size)
        self.costs = check_costs(costs)
        self._arguments = DecodeArguments(shape, dtype, options, layout, num_kv_heads=self._heads.num_kv_heads,
                                          scale=scale, device_id=self.device_id)
        self._capability, self._sharing = capability, (shared_costs, sharing_rule, read_stages)
        self._shared: SharedReads | None = None
        self._plan: Plan | None = None
        self._checked_plan: list | None = None
        self._in_graphs: list[tuple] = []  # what captured graphs read of the engine's own
        self.router: Router | None = None
        if schedule == "auto":
            self.router = Router(shape, dtype, device=device, layers=layers, scale=scale, options=options,
                                 layout=layout)
            return  # the routes have engines of their own
        self._kernels = DecodeKernels(self.config, planned_on_gpu=schedule == "balanced", overlap=capability >= 90)
        self._partials, self._workspace_at = None, 0
        if schedule == "balanced":
            self._partials = cupy.full(self.config.workspace_bytes(self.num_ctas), 0xFF, dtype=cupy.uint8)
            self._workspace_at = self._partials.data.ptr
            cupy.cuda.get_current_stream().synchronize()  # the first run may be on another stream

    def plan(self, seq_lens: object = None, block_table: object = None, *, indptr: object = None,
             indices: object = None, last_page_len: object = None, validate: bool = False,
             host_seq_lens: object = None, groups: object = None) -> None:
        """Prepares a step. Arrays are NumPy, CuPy or torch; those on the GPU are used where they are.

        seq_lens [batch_size] int32 and block_table [batch_size, max_pages] int32 or int64; or CSR: indptr
        [batch_size + 1] int32 and indices [num_indices] int32 or int64, row r owning indices[indptr[r]:indptr[r + 1]],
        with seq_lens or with last_page_len [batch_size] int32, the tokens in each row's last page. A captured run never
        reads more indices than there were at its capture: capture with a buffer that holds every step's.
        Lengths on the host are always checked, of CSR where indptr is there too. validate=True copies arrays on the
        GPU to the host to check lengths and offsets now, and page ids at the next run, when the pool is known.
        host_seq_lens: of auto, the same lengths on the host, where seq_lens are on the GPU.
        groups (balanced): rows that begin with the same pages read these once, together. PrefixGroups(group_of_row
        [batch_size] int32, prefix_pages [num_groups] int32) of any library; those on the GPU may change in place
        between runs, as lengths may. That the pages are the same is the caller's word, checked by validate=True alone.
        "auto": the first run after this call finds them on the GPU, and so does each captured graph when it is
        replayed; they are used where that is worth it. Tables that change in place outside a graph need a plan.

        Raises ValueError naming the argument, and leaves the last plan as it was. The first plan of each kind of table
        compiles its kernel, and must not be under capture.
        """
        if self.router is not None:
            checks.check_routed(indptr=indptr, indices=indices, last_page_len=last_page_len, groups=groups)
            self.router.plan(seq_lens, block_table, host_seq_lens=host_seq_lens, validate=validate)
            return
        named = seq_lens, block_table, indptr, indices, last_page_len
        addresses, key = fingerprint(named)
        key.append(groups_key(groups))
        if key == self._checked_plan and not validate and self._plan.move(named, addresses, self.shape.page_size):
            return
        given = StepTables(*named)
        if isinstance(seq_lens, (list, tuple)):
            given = given._replace(seq_lens=check_seq_lens(seq_lens))
        views = given.views()
        checks.check_plan(views, self.device_id)
        checks.check_room(views, self._heads, segment_cost=self.costs.segment)
        if groups is not None:
            checks.expect("groups", f"None for schedule {self.schedule!r}", repr(groups), self.schedule == "balanced")
            if self._shared is None:
                costs, rule, stages = self._sharing
                self._shared = SharedReads(self._heads, self.config, self._capability, self.options,
                                           num_ctas=self.num_ctas, costs=costs, rule=rule, stages=stages)
            checks.check_room(views, self._heads, segment_cost=self.costs.segment + self._shared.costs.merge,
                              tile_cost=self._shared.most_tile_cost())
        host = host_lens = None
        if self.schedule != "balanced" or validate or given.lengths_on_host(views):
            host = given.on_host(page_ids=validate)
            checks.check_contents(host, self.shape.page_size)
            host_lens = host.lengths(self.shape.page_size)
            if validate and groups is not None and not isinstance(groups, str):
                check_host(groups, host, host_lens, self.shape.page_size)
        library = "torch" if any(array.library == "torch" for array in views.values()) else self._arguments.library
        # On the runs' stream copies are ordered with the runs, and freed memory is not taken up before they end.
        with arrays.on_stream(library, self.device_id) as stream:
            if self.schedule == "balanced":
                plan = place(given, views, self.shape.page_size)
            else:
                schedule = make_schedule(self.schedule, self._heads, host_lens, splits=self.splits,
                                         tile_tokens=self.tile_tokens, window=self.options.reach)
                plan = place(*given.with_lengths(views, host_lens), self.shape.page_size)
                plan.task_list = upload_tasks(schedule, host_lens)
                self._reserve_partials(schedule)
            if groups is None:
                plan.decode = self._kernels.decode(plan.layout)
            else:
                plan.groups = self._shared.place(groups, plan, self.device_id)
                plan.decode = self._kernels.shared(plan.layout, self._shared.config, self._shared.shared_bytes)
            if self._arguments.library is None:
                stream.synchronize()  # the first run may be on another stream
        if validate:
            plan.unchecked_ids = host, host_lens
        on_gpu = all(array.device >= 0 for array in views.values()) and (groups is None or not plan.groups.copied)
        self._checked_plan = key if on_gpu and self.schedule == "balanced" else None
        self._plan = plan

    def _reserve_partials(self, schedule: Schedule) -> None:
        need = max(1, int(schedule.split_offsets[-1])) * self._heads.num_kv_heads * self.config.state_bytes
        if self._partials is None or self._partials.nbytes < need:
            self._partials = cupy.empty(need, dtype=cupy.uint8)
            self._workspace_at = self._partials.data.ptr

    def run(self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None,
            scale: float | None = None, sinks: object = None, query_lens: object = None, k_scale: object = None,
            v_scale: object = None) -> tuple[object, object]:
        """Attention of the planned step, on the caller's current stream.

        q [batch_size, num_q_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim], or
        k_pages alone a combined [num_pages, 2, num_kv_heads, page_size, head_dim]; NHD has the axes its way. CuPy or
        torch, all alike. out like q and lse [batch_size, num_q_heads] float32 (natural log) are made when not given.
        Rows of length 0 give zeros and -inf. Returns (out, lse).
        scale: of the logits of this run, a finite number; a routed schedule="auto" has the constructor's alone. sinks
        [num_q_heads] float32 on the GPU, with options.sinks. With options.query_tokens = n > 1, q, out and lse have an
        axis [batch_size, n, ..], and query_lens [batch_size] int32 on the GPU may say how many of the n a row has, the
        first ones; outputs of the others are left as they were.
        k_scale, v_scale: of an 8-bit cache, which holds value / scale (FP8 pages may be uint8). With options.kv_scales
        "tensor" a positive number or one float32 on the GPU each, by default 1; with "page" float32 [num_pages,
        num_kv_heads], with "token" float32 of the pages' shape less the last axis, as CacheWriter writes them, none
        negative and V's at most 2^60 (below 2^-60 they count as 0).

        Raises ValueError naming the argument, before any launch; RuntimeError when nothing was planned.
        """
        if self.router is not None:
            checks.check_routed(scale=scale, query_lens=query_lens, k_scale=k_scale, v_scale=v_scale)
            return self.router.run(q, k_pages, v_pages, out=out, lse=lse, sinks=sinks)
        plan = self._plan
        if plan is None:
            raise RuntimeError("run: call plan() first")
        if v_pages is None:
            k_pages, v_pages = arrays.split_combined(k_pages)
        if out is None or lse is None:
            heads = arrays.shape_of("q", q)[:-1]
            out = arrays.empty_like(q, (*heads, self.options.value_dim(self.shape)), self.dtype) if out is None else out
            lse = arrays.empty_like(q, heads, "float32") if lse is None else lse
        shared = plan.groups
        workspace_at = self._workspace_at if shared is None else shared.workspace_at
        given = self._arguments.take(plan, workspace_at, q, k_pages, v_pages, out, lse, scale, sinks, query_lens,
                                     k_scale, v_scale)
        stream = arrays.current_stream(self._arguments.library, self.device_id)
        if (plan.copies or plan.task_list or shared) and not plan.in_graph and arrays.is_capturing(stream):
            self._in_graphs.append((plan.copies, plan.task_list, self._partials, shared and shared.owned))
            plan.in_graph = True
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
                merge_args = *given, offsets, bucket.rows.data.ptr
                self._kernels.merge()((self._heads.num_kv_heads, len(bucket.rows)), merge_args, stream)
        return out, lse

    def release_arrays(self) -> None:
        """Lets go of the planned arrays, for a caller who keeps them alive or plans again before the next run."""
        if self._plan is not None:
            self._plan.arrays = ()

    def drain(self) -> None:
        """Waits for the GPU, after which the engine may be dropped whatever stream it ran on."""
        cupy.cuda.Device(self.device_id).synchronize()

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
