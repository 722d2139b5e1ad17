"""DecodeEngine: paged decode attention on the GPU, under one of our schedules or by whichever route is cheapest."""
from __future__ import annotations

from os import PathLike

import cupy

from gpu.engine.schedule_engine import SCHEDULES, ScheduleEngine
from gpu.inputs import checks
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run
from gpu.kernels.this_gpu import this_gpu
from gpu.kernels.variant import kernel_config
from gpu.routes.router import Router
from pkvsim import DecodeShape
from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.costs import BalancedCosts, SharedCosts
from pkvsim.schedule.prefixes import SharingRule

AUTO = "auto"


class DecodeEngine:
    """Decode attention for one head shape and dtype.

    schedule "balanced" plans on the GPU: plan() only notes where the arrays are, lengths and tables may change in
    place between runs (also inside a captured CUDA graph), and each run is one launch. "workqueue" and "split" plan
    on the host as the paper does. "auto" prices every route of the step, FlashInfer's included, and takes the cheapest
    where the host knows the lengths, balanced where only the GPU does: gpu.routes.router.Router says how.

    plan() and run() belong on one stream: runs share the engine's workspace. Use an engine per stream. An engine is of
    the GPU that is current when it is made, which should be the current one in its calls, too. It must live as long as
    the graphs that captured its runs; it keeps for them what it copied or allocated itself.

    schedule_engine: what runs the schedule, None of auto. router: what chooses the routes, None but of auto.
    """

    __slots__ = ("shape", "dtype", "schedule", "options", "layout", "schedule_engine", "router", "_runs", "_device_id")

    def __init__(self, shape: DecodeShape, dtype: str = "float16", schedule: str = "balanced", *, splits: object = 20,
                 tile_tokens: int = 32, num_ctas: int | None = None, costs: BalancedCosts | None = None,
                 variant: tuple[int, int] | None = None, options: AttentionOptions = PLAIN,
                 kv_dtype: str | None = None, kv_scales: str | None = None, layout: str = "HND",
                 scale: float | None = None, device: DeviceSpec | str | PathLike | None = None, layers: int = 1,
                 shared_costs: SharedCosts | None = None, sharing_rule: SharingRule | None = None,
                 read_stages: int | None = None) -> None:
        """
        shape: the head shape; dtype: "float16" or "bfloat16"; schedule: "balanced", "workqueue", "split" or "auto".
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
        in each of their rings. By default what was measured or calculated for this GPU and kernel.

        Raises ValueError naming the argument when it is out of range or no kernel serves the shape on this GPU.
        """
        checks.check_engine(shape, dtype, schedule, (*SCHEDULES, AUTO), options, layout, tile_tokens, variant)
        options = options.with_cache(kv_dtype, kv_scales)
        self.shape, self.dtype, self.schedule, self.options, self.layout = shape, dtype, schedule, options, layout
        self._device_id = cupy.cuda.Device().id
        self.schedule_engine: ScheduleEngine | None = None
        self.router: Router | None = None
        self._runs: ScheduleEngine | Router  # whichever of the two there is
        if schedule == AUTO:
            # The routes' engines are built when a step first takes them; what no kernel serves is refused at once.
            kernel_config(shape, dtype, this_gpu().compute_capability, options=options)
            self._runs = self.router = Router(shape, dtype, device=device, layers=layers, scale=scale, options=options,
                                              layout=layout)
        else:
            self._runs = self.schedule_engine = ScheduleEngine(
                shape, dtype, schedule, splits=splits, tile_tokens=tile_tokens, num_ctas=num_ctas, costs=costs,
                variant=variant, options=options, layout=layout, scale=scale, shared_costs=shared_costs,
                sharing_rule=sharing_rule, read_stages=read_stages)

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
        replayed; they are used where that is worth it, and not looked for where a block table has no room for rows
        that could save enough. Tables that change in place outside a graph need a plan.

        Raises ValueError naming the argument, and leaves the last plan as it was. The first plan of each kind of table
        compiles its kernel, and must not be under capture.
        """
        if self.schedule_engine is not None:
            tables = StepTables(seq_lens, block_table, indptr, indices, last_page_len)
            self.schedule_engine.plan(tables, validate=validate, groups=groups)
        elif self.router is not None:
            checks.check_routed(indptr=indptr, indices=indices, last_page_len=last_page_len, groups=groups)
            self.router.plan(seq_lens, block_table, host_seq_lens=host_seq_lens, validate=validate)

    def run(self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None,
            scale: float | None = None, sinks: object = None, query_lens: object = None, k_scale: object = None,
            v_scale: object = None, selected: object = None,
            page_lse: object = None) -> tuple[object, object | None]:
        """Attention of the planned step, on the caller's current stream.

        q [batch_size, num_q_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim], or
        k_pages alone a combined [num_pages, 2, num_kv_heads, page_size, head_dim]; NHD has the axes its way. CuPy or
        torch, all alike. out like q and lse [batch_size, num_q_heads] float32 (natural log) are made when not given.
        Rows of length 0 give zeros and -inf. Returns (out, lse).
        scale: of the logits of this run, a finite number; a routed schedule="auto" has the constructor's alone. sinks
        [num_q_heads] float32 on the GPU, with options.sinks. With options.query_tokens = n > 1, q, out and lse have an
        axis [batch_size, n, ..], and query_lens [batch_size] int32 on the GPU may say how many of the n a row has, the
        first ones; outputs of the others are left as they were. A length counts the row's query tokens: of a row with
        fewer tokens than these, those that see none may get anything, even NaN.
        k_scale, v_scale: of an 8-bit cache, which holds value / scale (FP8 pages may be uint8). With options.kv_scales
        "tensor" a positive number or one float32 on the GPU each, by default 1; with "page" float32 [num_pages,
        num_kv_heads], with "token" float32 of the pages' shape less the last axis, as CacheWriter writes them, none
        negative and V's at most 2^60 (below 2^-60 they count as 0).

        selected (balanced): PageList(pages [batch_size, num_kv_heads, max_selected] int32, counts [batch_size,
        num_kv_heads] int32) on the GPU: each (row, KV head) attends to the tokens of these pages alone. Pages are named
        by their places in the row (column of the block table), ascending, each once; entries from counts on are not
        read. A list without pages gives zeros and -inf. Both arrays may change in place between runs, also under a
        captured graph. Not with a window or groups.
        page_lse (balanced): float32 on the GPU, written: the log-sum-exp (natural log) of the logits of every 16 tokens
        for each query head, so that exp(page_lse - lse) is the share of the attention that they get. [batch_size,
        num_kv_heads, tiles, (query_tokens,) group_size], as many tiles of 16 tokens as are wanted, from a row's start
        on; with `selected` they count through the listed pages. What is not read is left as it was. Not with groups,
        nor with pages of other than whole tiles.
        The first run with either compiles its kernel, and must not be under capture.

        Raises ValueError naming the argument, before any launch; RuntimeError when nothing was planned.
        """
        return self._runs.run(
            Run(q, k_pages, v_pages, out, lse, scale, sinks, query_lens, k_scale, v_scale, selected, page_lse))

    def release_arrays(self) -> None:
        """Lets go of the planned arrays, for a caller who keeps them alive or plans again before the next run."""
        if self.schedule_engine is not None:
            self.schedule_engine.release_arrays()

    def drain(self) -> None:
        """Waits for the GPU, after which the engine may be dropped whatever stream it ran on."""
        cupy.cuda.Device(self._device_id).synchronize()
