"""DecodeEngine: paged decode attention on the GPU, under any of the schedules of pkvsim.schedule."""
from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from gpu import arrays
from gpu import validate as checks
from gpu.config import TILE_TOKENS, kernel_config
from gpu.kernels import load_kernel
from pkvsim import DecodeShape, make_schedule
from pkvsim.shapes import check_int, check_seq_lens

SCHEDULES = ("balanced", "workqueue", "split", "auto")
SIZES = "iiiqiif"  # batch_size to scale_log2, the parameters that both decode kernels share
LOG2_E = 1.4426950408889634
MAX_CTAS = 2**15  # the planner multiplies two range numbers in 32 bits
MAX_COST = 2**31  # the planner counts tiles in 32 bits


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One decode launch and its merge: tasks [begin, begin + count) of the list, rows to merge (None: no merge)."""

    begin: int
    count: int
    rows: object | None  # [num_rows] int32, CuPy


@dataclass(frozen=True, slots=True)
class _TaskList:
    """The host-planned schedules on the GPU, as CuPy arrays."""

    tasks: object  # [num_tasks, 5] int32
    split_offsets: object  # [batch_size + 1] int32
    buckets: tuple[_Bucket, ...]


@dataclass(slots=True)
class _Plan:
    """What plan() leaves for run(). `arrays` keeps seq_lens and block_table alive behind their addresses."""

    arrays: tuple
    seq_lens: int  # address, [batch_size] int32
    block_table: int  # address, [batch_size, table_stride] int32
    batch_size: int
    table_stride: int
    task_list: _TaskList | None = None
    unchecked_ids: tuple | None = None  # (block_table, seq_lens) on the host, to check at the next run


class DecodeEngine:
    """Decode attention for one head shape and dtype.

    schedule "balanced" plans on the GPU: plan() only notes where the arrays are, lengths and tables may change in
    place between runs (also inside a captured CUDA graph), and each run is one launch. "workqueue" and "split" plan
    on the host as the paper does. "auto" takes balanced, the schedule without a losing regime.

    plan() and run() belong on one stream: runs share the engine's workspace. Use an engine per stream.
    """

    def __init__(self, shape: DecodeShape, dtype: str = "float16", schedule: str = "balanced", *, splits: object = 20,
                 tile_tokens: int = 32, num_ctas: int | None = None, segment_cost: int = 8, min_cost: int | None = None,
                 scale: float | None = None) -> None:
        """
        shape: the head shape; dtype: "float16" or "bfloat16"; schedule: one of SCHEDULES.
        splits: sequence splits per row, an int or one per row (workqueue, split). tile_tokens: tokens per tile of
        those schedules, a multiple of 16. num_ctas: CTAs of a launch, by default one per SM. segment_cost, min_cost:
        fixed cost of a segment and least cost of a CTA in tiles of 16 tokens (balanced); the defaults are from a sweep
        on an H200 (2026-11-21). scale: of the logits, by default head_dim ** -0.5.

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
        self.num_ctas = device.attributes["MultiProcessorCount"] if num_ctas is None else check_int("num_ctas", num_ctas, 1, MAX_CTAS)
        self.splits, self.tile_tokens = splits, tile_tokens
        self.segment_cost = check_int("segment_cost", segment_cost, 0, 2**20)
        # A larger group's partial states are dearer to merge, so its short steps take fewer CTAs.
        self.min_cost = min(32, max(8, 4 * shape.group_size - 8)) if min_cost is None else check_int(
            "min_cost", min_cost, 1, 2**20)
        self._scale_log2 = (scale if scale is not None else shape.head_dim**-0.5) * LOG2_E
        self._plan: _Plan | None = None
        self._checked_plan: tuple | None = None
        self._checked_run: tuple | None = None
        self._page_layout: tuple = ()
        self._library: str | None = None  # whose arrays and streams the runs use; known from the first run on
        defines, threads = self.config.defines(), self.config.threads
        shared = self.config.shared_bytes
        overlap = int(device.compute_capability) >= 90
        if self.schedule == "balanced":
            self._decode = load_kernel("balanced.cu", "pkv_decode_balanced", "pppppppp" + SIZES + "ii", defines,
                                       threads=threads, shared_bytes=shared, overlap=overlap)
            self._partials = cupy.full(self.num_ctas * self.config.state_bytes, 0xFF, dtype=cupy.uint8)
            cupy.cuda.get_current_stream().synchronize()  # the first run may be on another stream
        else:
            self._decode = load_kernel("decode.cu", "pkv_decode_tasks", "ppppppppppii" + SIZES, defines, threads=threads,
                                       shared_bytes=shared, overlap=overlap)
            self._merge = load_kernel("merge.cu", "pkv_merge", "ppppp", defines, threads=threads, overlap=overlap)
            self._partials = None

    def plan(self, seq_lens: object, block_table: object, *, validate: bool = False) -> None:
        """Prepares a step.

        seq_lens [batch_size] int32, block_table [batch_size, max_pages] int32: NumPy, CuPy or torch. Arrays on the
        GPU are used where they are. Lengths on the host are always checked. validate=True copies arrays on the
        GPU to the host to check every length now, and every page id at the next run, when the pool is known.

        Raises ValueError naming the argument.
        """
        lens_address, lens_key = arrays.fingerprint(seq_lens)
        table_address, table_key = arrays.fingerprint(block_table)
        key = lens_key, table_key
        if key == self._checked_plan and not validate:
            old = self._plan  # device arrays of a known layout: only where they are can have changed
            self._plan = _Plan((seq_lens, block_table), lens_address, table_address, old.batch_size, old.table_stride)
            return
        if isinstance(seq_lens, (list, tuple)):
            seq_lens = check_seq_lens(seq_lens)
        lens, table = arrays.view("seq_lens", seq_lens), arrays.view("block_table", block_table)
        checks.check_plan(lens, table, self.device_id)
        batch, max_pages = table.shape
        host_lens = None
        if self.schedule != "balanced" or lens.device < 0 or validate:
            host_lens = arrays.to_host("seq_lens", seq_lens)
            checks.check_lengths(host_lens, self.shape, max_pages)
        tiles = batch * self.shape.num_kv_heads * (-(-max_pages * self.shape.page_size // TILE_TOKENS) + self.segment_cost)
        if tiles >= MAX_COST:
            raise ValueError(f"block_table: expected room for fewer than {MAX_COST} tiles of {TILE_TOKENS} tokens over all "
                             f"rows and KV heads, got {tiles}")
        library = "torch" if "torch" in (lens.library, table.library) else self._library
        # On the runs' stream copies are ordered with the runs, and freed memory is not taken up before they end.
        with arrays.on_stream(library, self.device_id) as stream:
            lens_array, lens_address = arrays.to_gpu("seq_lens", seq_lens)
            table_array, table_address = arrays.to_gpu("block_table", block_table)
            plan = _Plan((lens_array, table_array), lens_address, table_address, batch, table.strides[0] if batch > 1 else max_pages)
            if self.schedule != "balanced":
                plan.task_list = self._upload_tasks(host_lens)
            if self._library is None:
                stream.synchronize()  # the first run may be on another stream
        if validate:
            plan.unchecked_ids = arrays.to_host("block_table", block_table), host_lens
        on_gpu = lens.device >= 0 and table.device >= 0
        self._checked_plan = key if on_gpu and self.schedule == "balanced" else None
        if self._plan is None or self._plan.batch_size != batch:
            self._checked_run = None
        self._plan = plan

    def _upload_tasks(self, lens: np.ndarray) -> _TaskList:
        schedule = make_schedule(self.schedule, self.shape, lens, splits=self.splits, tile_tokens=self.tile_tokens)
        tasks, rows = schedule.tasks, np.arange(len(lens), dtype=np.int32)
        # The split schedule launches once for every distinct length; the workqueue once for all rows.
        keys = lens[tasks["row"]] if self.schedule == "split" else np.zeros(len(tasks), np.int32)
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1)) if len(tasks) else np.zeros(1, np.int64)
        buckets = []
        for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist()):
            chosen = rows if self.schedule == "workqueue" else np.unique(tasks["row"][order[begin:end]]).astype(np.int32)
            merges = (np.diff(schedule.split_offsets)[chosen] > 1).any()
            buckets.append(_Bucket(begin, end - begin, cupy.asarray(chosen) if merges else None))
        need = max(1, int(schedule.split_offsets[-1])) * self.shape.num_kv_heads * self.config.state_bytes
        if self._partials is None or self._partials.nbytes < need:
            self._partials = cupy.empty(need, dtype=cupy.uint8)
        # Without a task one launch still writes the zeros of the empty rows.
        return _TaskList(cupy.asarray(np.ascontiguousarray(tasks[order]).view(np.int32).reshape(-1, 5)),
                         cupy.asarray(schedule.split_offsets), tuple(buckets) or (_Bucket(0, 0, None),))

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
            arrays.view("k_pages", k_pages)
            if len(k_pages.shape) != 5 or k_pages.shape[1] != 2:
                raise ValueError(f"v_pages: expected pages, or a combined k_pages [num_pages, 2, ...], got None and {list(k_pages.shape)}")
            k_pages, v_pages = k_pages[:, 0], k_pages[:, 1]
        if out is None or lse is None:
            described = arrays.view("q", q)
            out = arrays.empty_like(q, described, described.shape, self.dtype) if out is None else out
            lse = arrays.empty_like(q, described, described.shape[:2], "float32") if lse is None else lse
        (q_at, q_key), (k_at, k_key), (v_at, v_key), (out_at, out_key), (lse_at, lse_key) = map(
            arrays.fingerprint, (q, k_pages, v_pages, out, lse))
        keys = q_key, k_key, v_key, out_key, lse_key
        if keys != self._checked_run:
            self._check_run(plan, q, k_pages, v_pages, out, lse)
            self._checked_run = keys
        if plan.unchecked_ids is not None:
            checks.check_page_ids(*plan.unchecked_ids, self.shape.page_size, k_pages.shape[0])
            plan.unchecked_ids = None
        stream = arrays.current_stream(self._library, self.device_id)
        common = q_at, k_at, v_at, plan.block_table, plan.seq_lens, out_at, lse_at, self._partials.data.ptr
        sizes = plan.batch_size, self.shape.num_kv_heads, plan.table_stride, *self._page_layout, self._scale_log2
        if plan.task_list is None:
            self._decode(self.num_ctas, (*common, *sizes, self.segment_cost, self.min_cost), stream)
            return out, lse
        tasks, offsets = plan.task_list.tasks, plan.task_list.split_offsets.data.ptr
        for bucket in plan.task_list.buckets:
            first = tasks.data.ptr + bucket.begin * tasks.strides[0]
            list_args = first, offsets, bucket.count, self.tile_tokens // TILE_TOKENS
            self._decode(max(1, min(self.num_ctas, bucket.count)), (*common, *list_args, *sizes), stream)
            if bucket.rows is not None:
                merge_args = self._partials.data.ptr, offsets, bucket.rows.data.ptr, out_at, lse_at
                self._merge((self.shape.num_kv_heads, len(bucket.rows)), merge_args, stream)
        return out, lse

    def _check_run(self, plan: _Plan, q: object, k_pages: object, v_pages: object, out: object, lse: object) -> None:
        views = [arrays.view(name, array) for name, array in
                 (("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("out", out), ("lse", lse))]
        checks.check_run(self.shape, self.dtype, plan.batch_size, self.device_id, *views)
        pages = views[1]
        self._library = pages.library
        self._page_layout = pages.strides[0], pages.strides[1], self.shape.head_dim  # page, head, token strides

    def device_tasks(self, *, max_tasks: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """The balanced schedule as the GPU plans it: pkvsim's task array and cta_offsets [num_ctas + 1]. Synchronises."""
        plan = self._plan
        if plan is None or self.schedule != "balanced":
            raise RuntimeError("device_tasks: needs a planned engine with schedule='balanced'")
        kernel = load_kernel("plan.cu", "pkv_list_balanced", "piiiipip", {}, threads=32)
        listed = cupy.empty((self.num_ctas, max_tasks, 5), dtype=cupy.int32)
        counts = cupy.empty(self.num_ctas, dtype=cupy.int32)
        kernel(self.num_ctas, (plan.seq_lens, plan.batch_size, self.shape.num_kv_heads, self.segment_cost, self.min_cost,
                               listed.data.ptr, max_tasks, counts.data.ptr), cupy.cuda.get_current_stream().ptr)
        counts = counts.get()
        if counts.max(initial=0) > max_tasks:
            raise ValueError(f"max_tasks: expected at least {int(counts.max())}, got {max_tasks}")
        counts = counts[:max(1, len(np.trim_zeros(counts, "b")))]  # CTAs past the last range idle
        rows = np.concatenate([block[:n] for block, n in zip(listed.get(), counts)]) if counts.sum() else np.empty((0, 5), np.int32)
        names = ("row", "kv_head", "split", "tile_begin", "tile_end")
        tasks = np.ascontiguousarray(rows).view([(name, np.int32) for name in names]).reshape(-1)
        return tasks, np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
