"""DecodeEngine: paged decode attention on the GPU, under any of the schedules of pkvsim.schedule."""
from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from gpu import arrays, validate
from gpu.config import TILE_TOKENS, kernel_config
from gpu.kernels import load_kernel
from pkvsim import DecodeShape, make_schedule

SCHEDULES = ("balanced", "workqueue", "split", "auto")
LOG2_E = 1.4426950408889634
MAX_COST = 2**31  # the planner counts tiles in 32 bits


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One decode launch and its merge: tasks [begin, end) of the uploaded list, rows to merge (None: no merge)."""

    begin: int
    count: int
    rows: object | None  # [num_rows] int32 on the GPU


@dataclass(slots=True)
class _Plan:
    """What plan() leaves for run()."""

    seq_lens: object  # [batch_size] int32 on the GPU
    block_table: object  # [batch_size, max_pages] int32 on the GPU
    batch_size: int
    table_stride: int
    tasks: object | None = None  # [num_tasks, 5] int32 on the GPU
    split_offsets: object | None = None  # [batch_size + 1] int32 on the GPU
    buckets: tuple[_Bucket, ...] = ()
    partials: object | None = None


class DecodeEngine:
    """Decode attention for one head shape and dtype.

    schedule "balanced" plans on the GPU: plan() only notes where the arrays are, lengths and tables may change in
    place between runs (also inside a captured CUDA graph), and each run is one launch. "workqueue" and "split" plan
    on the host as the paper does. "auto" takes balanced, the schedule without a losing regime.

    Not safe for runs on several streams at once: they would share the workspace. Use an engine per stream.
    """

    def __init__(self, shape: DecodeShape, dtype: str = "float16", schedule: str = "balanced", *, splits: object = 20,
                 tile_tokens: int = 32, num_ctas: int | None = None, segment_cost: int = 6, min_cost: int = 8,
                 scale: float | None = None) -> None:
        """
        shape: the head shape; dtype: "float16" or "bfloat16"; schedule: one of SCHEDULES.
        splits: sequence splits per row, an int or one per row (workqueue, split). tile_tokens: tokens per tile of
        those schedules, a multiple of 16. num_ctas: CTAs of a launch, by default one per SM. segment_cost, min_cost:
        fixed cost of a segment and least cost of a CTA in tiles of 16 tokens (balanced). scale: of the logits, by
        default head_dim ** -0.5.

        Raises ValueError naming the argument when it is out of range or no kernel serves the shape on this GPU.
        """
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if tile_tokens <= 0 or tile_tokens % TILE_TOKENS:
            raise ValueError(f"tile_tokens: expected a positive multiple of {TILE_TOKENS}, got {tile_tokens}")
        device = cupy.cuda.Device()
        self.shape, self.dtype = shape, dtype
        self.schedule = "balanced" if schedule == "auto" else schedule
        self.config = kernel_config(shape, dtype, int(device.compute_capability))
        self.device_id = device.id
        self.num_ctas = num_ctas or device.attributes["MultiProcessorCount"]
        self.splits, self.tile_tokens = splits, tile_tokens
        self.segment_cost, self.min_cost = segment_cost, min_cost
        self._scale_log2 = np.float32((scale if scale is not None else shape.head_dim**-0.5) * LOG2_E)
        self._plan: _Plan | None = None
        self._checked_run: tuple | None = None
        self._constants: tuple = ()
        defines, threads = self.config.defines(), self.config.threads
        shared = self.config.shared_bytes
        overlap = int(device.compute_capability) >= 90
        if self.schedule == "balanced":
            self._decode = load_kernel("balanced.cu", "pkv_decode_balanced", defines, threads=threads, shared_bytes=shared, overlap=overlap)
            self._partials = cupy.full(self.num_ctas * self.config.state_bytes, 0xFF, dtype=cupy.uint8)
        else:
            self._decode = load_kernel("decode.cu", "pkv_decode_tasks", defines, threads=threads, shared_bytes=shared, overlap=overlap)
            self._merge = load_kernel("merge.cu", "pkv_merge", defines, threads=threads, overlap=overlap)
            self._partials = None

    def plan(self, seq_lens: object, block_table: object, *, validate_ids: int | None = None) -> None:
        """Prepares a step.

        seq_lens [batch_size] int32, block_table [batch_size, max_pages] int32: NumPy, CuPy or torch. Arrays on the
        GPU are used where they are. Lengths on the host are always checked; with validate_ids=num_pages every page id
        and length is, which copies arrays on the GPU to the host.

        Raises ValueError naming the argument.
        """
        if isinstance(seq_lens, (list, tuple)):
            seq_lens = np.asarray(seq_lens, dtype=np.int32)
        lens, table = arrays.view("seq_lens", seq_lens), arrays.view("block_table", block_table)
        validate.check_plan(lens, table, self.device_id)
        max_pages = table.shape[1]
        on_host = self.schedule != "balanced" or lens.device < 0 or validate_ids is not None
        host_lens = arrays.to_host("seq_lens", seq_lens) if on_host else None
        if host_lens is not None:
            validate.check_lengths(host_lens, self.shape, max_pages)
        if validate_ids is not None:
            validate.check_page_ids(arrays.to_host("block_table", block_table), host_lens, self.shape.page_size, validate_ids)
        batch = lens.shape[0]
        tiles = batch * (-(-max_pages * self.shape.page_size // TILE_TOKENS) + self.segment_cost)
        if tiles * self.shape.num_kv_heads >= MAX_COST:
            raise ValueError(f"block_table: expected fewer than {MAX_COST} tiles of {TILE_TOKENS} tokens over all KV heads, "
                             f"got up to {tiles * self.shape.num_kv_heads}")
        plan = _Plan(arrays.to_cupy("seq_lens", seq_lens), arrays.to_cupy("block_table", block_table), batch,
                     table.strides[0] if batch > 1 else max_pages)
        if self.schedule != "balanced":
            self._plan_tasks(plan, host_lens)
        if self._plan is None or self._plan.batch_size != batch:
            self._checked_run = None
        self._plan = plan

    def _plan_tasks(self, plan: _Plan, lens: np.ndarray) -> None:
        schedule = make_schedule(self.schedule, self.shape, lens, splits=self.splits, tile_tokens=self.tile_tokens)
        tasks, rows = schedule.tasks, np.arange(len(lens), dtype=np.int32)
        # The split schedule launches once for every distinct length; the workqueue once for all rows.
        keys = lens[tasks["row"]] if self.schedule == "split" else np.zeros(len(tasks), np.int32)
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1)) if len(tasks) else np.zeros(1, np.int64)
        plan.tasks = cupy.asarray(np.ascontiguousarray(tasks[order]).view(np.int32).reshape(-1, 5))
        plan.split_offsets = cupy.asarray(schedule.split_offsets)
        buckets = []
        for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist()):
            chosen = rows if self.schedule == "workqueue" else np.unique(tasks["row"][order[begin:end]]).astype(np.int32)
            merges = (np.diff(schedule.split_offsets)[chosen] > 1).any()
            buckets.append(_Bucket(begin, end - begin, cupy.asarray(chosen) if merges else None))
        # Without a task one launch still writes the zeros of the empty rows.
        plan.buckets = tuple(buckets) or (_Bucket(0, 0, None),)
        need = max(1, int(schedule.split_offsets[-1])) * self.shape.num_kv_heads * self.config.state_bytes
        if self._partials is None or self._partials.nbytes < need:
            self._partials = cupy.empty(need, dtype=cupy.uint8)

    def run(self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None) -> tuple[object, object]:
        """Attention of the planned step, on the caller's current stream.

        q [batch_size, num_q_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim], or
        k_pages alone a combined [num_pages, 2, num_kv_heads, page_size, head_dim]. CuPy or torch, all alike. out like q
        and lse [batch_size, num_q_heads] float32 (natural log) are made when not given. Rows of length 0 give zeros
        and -inf. Returns (out, lse).

        Raises ValueError naming the argument, before any launch; RuntimeError when nothing was planned.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("run: call plan() first")
        if v_pages is None:
            if len(k_pages.shape) != 5 or k_pages.shape[1] != 2:
                raise ValueError(f"v_pages: expected pages, or a combined k_pages [num_pages, 2, ...], got None and {list(k_pages.shape)}")
            k_pages, v_pages = k_pages[:, 0], k_pages[:, 1]
        vq, vk, vv = arrays.view("q", q), arrays.view("k_pages", k_pages), arrays.view("v_pages", v_pages)
        if out is None:
            out = arrays.empty_like(q, vq, vq.shape, self.dtype)
        if lse is None:
            lse = arrays.empty_like(q, vq, vq.shape[:2], "float32")
        vo, vl = arrays.view("out", out), arrays.view("lse", lse)
        layout = vq.layout, vk.layout, vv.layout, vo.layout, vl.layout
        if layout != self._checked_run:
            validate.check_run(self.shape, self.dtype, plan.batch_size, self.device_id, vq, vk, vv, vo, vl)
            self._checked_run = layout
            self._constants = (np.int64(vk.strides[0]), np.int32(vk.strides[1]), np.int32(self.shape.head_dim), self._scale_log2)
        common = vq.pointer, vk.pointer, vv.pointer, plan.block_table, plan.seq_lens, vo.pointer, vl.pointer, self._partials
        sizes = np.int32(plan.batch_size), np.int32(self.shape.num_kv_heads), np.int32(plan.table_stride), *self._constants
        stream = arrays.current_stream(vq.library)
        if self.schedule == "balanced":
            costs = np.int32(self.segment_cost), np.int32(self.min_cost)
            self._decode(self.num_ctas, (*common, *sizes, *costs), stream)
            return out, lse
        for bucket in plan.buckets:
            tasks = plan.tasks[bucket.begin:bucket.begin + bucket.count]
            scalars = np.int32(bucket.count), np.int32(self.tile_tokens // TILE_TOKENS)
            grid = max(1, min(self.num_ctas, bucket.count))
            self._decode(grid, (*common, tasks, plan.split_offsets, *scalars, *sizes), stream)
            if bucket.rows is not None:
                self._merge((self.shape.num_kv_heads, len(bucket.rows)),
                            (self._partials, plan.split_offsets, bucket.rows, vo.pointer, vl.pointer), stream)
        return out, lse

    def device_tasks(self, *, max_tasks: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """The balanced schedule as the GPU plans it: pkvsim's task array and cta_offsets [num_ctas + 1]. Synchronises."""
        plan = self._plan
        if plan is None or self.schedule != "balanced":
            raise RuntimeError("device_tasks: needs a planned engine with schedule='balanced'")
        kernel = load_kernel("plan.cu", "pkv_list_balanced", {}, threads=32)
        listed = cupy.empty((self.num_ctas, max_tasks, 5), dtype=cupy.int32)
        counts = cupy.empty(self.num_ctas, dtype=cupy.int32)
        kernel(self.num_ctas,
               (plan.seq_lens, np.int32(plan.batch_size), np.int32(self.shape.num_kv_heads), np.int32(self.segment_cost),
                np.int32(self.min_cost), listed, np.int32(max_tasks), counts), cupy.cuda.get_current_stream())
        counts = counts.get()
        if counts.max(initial=0) > max_tasks:
            raise ValueError(f"max_tasks: expected at least {int(counts.max())}, got {max_tasks}")
        counts = counts[:max(1, len(np.trim_zeros(counts, "b")))]  # CTAs past the last range idle
        rows = np.concatenate([block[:n] for block, n in zip(listed.get(), counts)]) if counts.sum() else np.empty((0, 5), np.int32)
        names = ("row", "kv_head", "split", "tile_begin", "tile_end")
        tasks = np.ascontiguousarray(rows).view([(name, np.int32) for name in names]).reshape(-1)
        return tasks, np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
