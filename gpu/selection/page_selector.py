"""PageSelector: scores, pins, budget and sorted lists of a step in one launch, with no host."""
from __future__ import annotations

from typing import NamedTuple

import cupy

from gpu.engine.plan import Plan, place
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables, TableLayout, fingerprint
from gpu.kernels.compile import load_kernel
from gpu.kernels.launch import Kernel
from gpu.kernels.this_gpu import this_gpu
from gpu.kernels.variant import shared_limit_bytes
from gpu.selection import variant
from gpu.selection.page_summaries import PageSummaries
from pkvsim import DecodeShape, PageList
from pkvsim.selection import by_name
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.served import MAX_GROUP_SIZE
from pkvsim.selection.summaries import check_form
from pkvsim.shapes import check_int


class _Launch(NamedTuple):
    """What a select() launches with that depends on sizes alone."""

    kernel: Kernel
    grid: tuple[int, int]
    lists_at: tuple[int, ...]  # addresses of pages and counts
    num_pages: int
    room: int  # of a list
    max_pages: int  # of a row
    chunk_pages: int
    sink_pages: int
    recent_pages: int
    library: str


class PageSelector:
    """Selects pages for one head shape, dtype and method.

    plan() notes where lengths and tables are, which may change in place; select() is one launch and leaves its lists in
    arrays of the selector's own, which stay where they are while batch size and table width do: a captured graph of
    select() and DecodeEngine.run(selected=...) follows queries, lengths and tables. Both belong on one stream, and the
    selector must live as long as such graphs.
    """

    __slots__ = ("shape", "dtype", "method", "budget", "pins", "max_selected", "summary_dtype", "lists", "_scale",
                 "_plan", "_launch", "_checked", "_checked_plan", "_kernels", "_scores", "_sums", "_tickets",
                 "_device_id", "_kept")

    def __init__(self, shape: DecodeShape, dtype: str = "float16", method: str | None = by_name.DEFAULT, *,
                 budget: Budget = Budget(), pins: Pins = Pins(), max_selected: int | None = None,  # noqa: B008
                 scale: float | None = None, summary_dtype: str | None = None) -> None:
        """method: "mean_std", "quest", "centroids", or None, whose scores each select() is given. budget, pins: see
        pkvsim.selection.rules. max_selected: room of each list; by default what the budget gives the longest row that
        the table has room for. scale: of the logits, by default head_dim ** -0.5. summary_dtype: of the PageSummaries
        that it is given.

        Raises ValueError naming the argument, or what no kernel serves.
        """
        variant.check_shape(shape, dtype)
        checks.expect("budget", "a Budget", repr(budget), isinstance(budget, Budget))
        checks.expect("pins", "Pins", repr(pins), isinstance(pins, Pins))
        check_form("" if method is None else by_name.method(method).SUMMARY, summary_dtype)
        self.shape, self.dtype, self.method, self.budget, self.pins = shape, dtype, method, budget, pins
        self.summary_dtype = summary_dtype
        self.max_selected = None if max_selected is None else check_int("max_selected", max_selected, 1)
        self._scale = shape.head_dim**-0.5 if scale is None else checks.check_scale(scale)
        self._device_id = cupy.cuda.Device().id
        self.lists: PageList | None = None  # of the last select()
        self._plan: Plan | None = None
        self._launch: _Launch | None = None
        self._checked: list | None = None
        self._checked_plan: list | None = None
        self._kernels: dict[tuple[TableLayout, int, int], Kernel] = {}
        self._scores = self._sums = self._tickets = None
        self._kept: list[tuple] = []  # buffers of other sizes, which captured graphs may read

    @property
    def summary(self) -> str | None:
        """The kind of summaries that the method scores."""
        return None if self.method is None else by_name.method(self.method).SUMMARY

    @property
    def _aggregation(self) -> str:
        return "maximum" if self.method is None else by_name.method(self.method).AGGREGATION

    def plan(self, seq_lens: object, block_table: object) -> None:
        """seq_lens [batch_size] int32, block_table [batch_size, max_pages] int32 or int64; those on the GPU are used
        where they are. Raises ValueError naming the argument."""
        tables = StepTables(seq_lens, block_table)
        addresses, key = fingerprint(tables)
        if key == self._checked_plan and self._plan.move(tables, addresses, self.shape.page_size):
            return
        views = tables.views()
        checks.check_plan(views, self._device_id)
        plan = place(tables, views, self.shape.page_size)
        lists = plan.batch_size * self.shape.num_kv_heads
        checks.expect("seq_lens", f"at most {variant.MAX_LISTS} rows times KV heads", lists, lists <= variant.MAX_LISTS)
        limit = shared_limit_bytes(this_gpu().compute_capability)
        most = variant.most_pages(self.shape, self._aggregation, limit)
        checks.expect("block_table", f"rows of at most {most} pages on this GPU", self._max_pages(plan),
                      self._max_pages(plan) <= most)
        if plan.copies:
            cupy.cuda.get_current_stream().synchronize()  # select() may be on another stream
        self._plan, self._checked_plan = plan, None if plan.copies else key

    def select(self, q: object, summaries: PageSummaries | None = None, *, scores: object = None,
               budgets: object = None) -> PageList:
        """The lists of the planned step, on the caller's current stream.

        q [batch_size, num_q_heads, head_dim] with the layer's summaries; or, of method None, scores [batch_size,
        num_kv_heads, max_pages] float32, contiguous. budgets [batch_size, num_kv_heads] int32 on the GPU: pages of each
        list in place of the selector's budget. The lists are the selector's own arrays, which the next select() writes
        again. Raises ValueError naming the argument; RuntimeError when nothing was planned. The first call of each
        layout compiles its kernel, and must not be under capture.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("select: call plan() first")
        array = None if summaries is None else getattr(summaries, "array", summaries)
        q = None if self.method is None else q
        scales = getattr(summaries, "scales", None)
        (q_at, summaries_at, scales_at, scores_at, budgets_at), keys = arrays.fingerprints(
            (q, array, scales, scores, budgets))
        keys += [plan.batch_size, plan.max_tokens, plan.layout, None if array is None else getattr(
            summaries, "made_for", None)]
        if keys != self._checked:
            self._check(plan, q, summaries, scores, budgets)
            self._checked = keys
        launch, shape = self._launch, self.shape
        if self.method is not None:
            scores_at = self._scores.data.ptr
        launch.kernel(launch.grid, (
            q_at, summaries_at, scales_at, plan.page_ids, plan.lengths, plan.row_begins, scores_at,
            0 if self._sums is None else self._sums.data.ptr, self._tickets.data.ptr, budgets_at, *launch.lists_at,
            plan.batch_size, shape.num_kv_heads, plan.stride, launch.num_pages, plan.max_tokens, launch.room,
            launch.max_pages, launch.chunk_pages, launch.sink_pages, launch.recent_pages, self.budget.least_pages,
            self.budget.parts, self._scale,
        ), arrays.current_stream(launch.library, self._device_id))  # fmt: skip
        return self.lists

    def _check(self, plan: Plan, q: object, summaries: PageSummaries | None, scores: object, budgets: object) -> None:
        """Checks what a select() is given, and prepares its launch."""
        shape, max_pages = self.shape, self._max_pages(plan)
        heads, num_pages = (plan.batch_size, shape.num_kv_heads), 2**31 - 1
        given = scores if self.method is None else q
        library = arrays.view("scores" if self.method is None else "q", given).library
        if self.method is None:
            checks.expect("summaries", "None with scores", type(summaries).__name__, summaries is None)
            self._expect("scores", scores, "float32", (*heads, max_pages), library)
        else:
            checks.expect("scores", "None of a method that scores itself", type(scores).__name__, scores is None)
            wanted = self.summary, shape, self.dtype, self.summary_dtype
            checks.expect("summaries", f"PageSummaries of kind {self.summary} and the same shape and dtypes", summaries,
                          isinstance(summaries, PageSummaries) and summaries.made_for == wanted)
            self._expect("q", q, self.dtype, (plan.batch_size, shape.num_q_heads, shape.head_dim), library)
            checks.check_boundary("q", arrays.view("q", q), variant.QUERY_BOUNDARY_BYTES)
            num_pages = summaries.array.shape[0]
        if budgets is not None:
            self._expect("budgets", budgets, "int32", heads, library)
        room = self.max_selected or max(1, self.budget.pages(max_pages, self.pins))
        self._reserve(given, heads, max_pages, room)
        lists, num_sms, warps = heads[0] * heads[1], this_gpu().num_sms, variant.WARPS
        chunks, each = 1, max_pages
        if self.method is not None:
            warps = variant.warps_of(shape, max_pages, lists, num_sms, self._aggregation)
            values = variant.page_values(shape, self._aggregation)
            chunks, each = variant.chunks(max_pages, lists, num_sms, values, warps)
        lists_at = tuple(arrays.view("lists", array).pointer for array in self.lists)
        kernel = self._kernel(plan.layout, max_pages, warps)
        grid = chunks * heads[1], heads[0]
        # A row has no more pages to pin than its table has room for, and the kernel adds the two up in 31 bits.
        sinks, recent = (min(max_pages, pages) for pages in (self.pins.sink_pages, self.pins.recent_pages))
        self._launch = _Launch(kernel, grid, lists_at, num_pages, room, max_pages, each, sinks, recent, library)

    def _max_pages(self, plan: Plan) -> int:
        return max(1, -(-plan.max_tokens // self.shape.page_size))

    def _expect(self, name: str, array: object, dtype: str, shape: tuple[int, ...], library: str) -> None:
        view = arrays.view(name, array)
        checks.expect(name, f"{dtype} {list(shape)} on cuda:{self._device_id} of {library}", view,
                      (view.dtype, view.shape, view.device, view.library) == (dtype, shape, self._device_id, library))
        checks.check_contiguous(name, view)

    def _reserve(self, like: object, heads: tuple[int, int], max_pages: int, room: int) -> None:
        """The selector's arrays for a step: kept while they are of the right size."""
        library = arrays.view("q", like).library
        if self.lists is None or (self.lists.pages.shape, arrays.view("lists", self.lists.pages).library) != (
            (*heads, room), library
        ):  # fmt: skip
            self._kept.append((self.lists,))
            self.lists = PageList(arrays.empty_like(like, (*heads, room), "int32"),
                                  arrays.empty_like(like, heads, "int32"))
        lists = heads[0] * heads[1]
        if self._tickets is None or self._tickets.shape[0] < lists:
            self._kept.append((self._tickets,))
            self._tickets = cupy.zeros(lists, dtype=cupy.int32)
            cupy.cuda.get_current_stream().synchronize()  # the launch may be on another stream
        need = lists * variant.page_values(self.shape, self._aggregation) * max_pages
        if self.method is not None and (self._scores is None or self._scores.shape[0] < need):
            self._kept.append((self._scores, self._sums))
            self._scores = cupy.empty(need, dtype=cupy.float32)
            # Of each chunk and query head two floats: chunks are whole PAGES_AT_ONCE pages.
            self._sums = cupy.empty(2 * (need // variant.PAGES_AT_ONCE + lists * MAX_GROUP_SIZE),
                                    dtype=cupy.float32)

    def _kernel(self, layout: TableLayout, max_pages: int, warps: int) -> Kernel:
        key = layout, max_pages, warps
        if key not in self._kernels:
            defines = variant.selection_defines(self.shape, self.dtype, self.summary, self._aggregation,
                                                self.summary_dtype, warps)
            shared_bytes = variant.select_bytes(self.shape, max_pages, self._aggregation, warps)
            self._kernels[key] = load_kernel(
                "select.cu", "pkv_select_pages", defines | layout.defines(), threads=warps * 32,
                shared_bytes=shared_bytes, overlap=this_gpu().overlaps)
        return self._kernels[key]
