"""Summaries of one layer's K pages, kept on the GPU beside them."""
from __future__ import annotations

import cupy

from gpu.engine.plan import place
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables, TableLayout
from gpu.kernels.compile import load_kernel
from gpu.kernels.launch import Kernel
from gpu.kernels.this_gpu import this_gpu
from gpu.selection import variant
from pkvsim import DecodeShape
from pkvsim.selection.summaries import MEAN_STD, SUMMARIES
from pkvsim.shapes import MAX_TOKENS, check_int


class PageSummaries:
    """Of every page and KV head: mean and standard deviation of its keys, or minimum and maximum, in 16 or 8 bits; or
    centroids of its keys in 4 bits.

    array [num_pages, num_kv_heads, 2, head_dim], torch or CuPy as the pages are; of 8 bits it holds codes, and scales
    [num_pages, num_kv_heads, 2] float32 goes with it (pkvsim.selection.summaries.decode says how), else None. Of
    centroids array [num_pages, num_kv_heads, 8, head_dim / 2] uint8 and scales [num_pages, num_kv_heads, 8, 2] float16
    are as pkvsim.selection.centroids.CodedCentroids has them. All are right for the pages that update() was told of:
    those of a row's new tokens, after every append.
    """

    __slots__ = ("shape", "dtype", "kind", "layout", "summary_dtype", "array", "scales", "_kernels", "_device_id")

    def __init__(self, shape: DecodeShape, k_pages: object, dtype: str = "float16", *, kind: str = MEAN_STD,
                 layout: str = "HND", summary_dtype: str | None = None) -> None:
        """k_pages: the pool, [num_pages, num_kv_heads, page_size, head_dim] (HND) or with tokens before heads (NHD), of
        `dtype`. kind: "mean_std", "min_max" or "centroids". summary_dtype: None, for that of the pages, or "uint8" for
        codes, which are half the bytes to score; None of centroids. Raises ValueError naming the argument."""
        variant.check_shape(shape, dtype)
        checks.expect("kind", f"one of {', '.join(SUMMARIES)}", repr(kind), kind in SUMMARIES)
        kept = variant.summary_arrays(kind, shape.head_dim, dtype, summary_dtype)
        checks.expect("layout", "HND or NHD", repr(layout), layout in ("HND", "NHD"))
        self.shape, self.dtype, self.kind, self.layout, self.summary_dtype = shape, dtype, kind, layout, summary_dtype
        self._device_id = cupy.cuda.Device().id
        self._kernels: dict[TableLayout, Kernel] = {}
        num_pages = self._check_pages(k_pages).shape[0]
        self.array, self.scales = (
            None if one is None else arrays.empty_like(k_pages, (num_pages, shape.num_kv_heads, *one[0]), one[1])
            for one in kept)  # fmt: skip

    @property
    def made_for(self) -> tuple[str, DecodeShape, str, str | None]:
        """(kind, shape, dtype, summary_dtype)"""
        return self.kind, self.shape, self.dtype, self.summary_dtype

    def update(self, k_pages: object, seq_lens: object, block_table: object, *, new_tokens: int | None = None) -> None:
        """Summarises anew the pages of each row's last `new_tokens` tokens, by default all of its pages, in one launch
        on the caller's current stream.

        seq_lens [batch_size] int32 with the new tokens counted in, block_table [batch_size, max_pages] int32 or int64,
        on the GPU or the host. Raises ValueError naming the argument. The first call compiles its kernel, and must not
        be under capture.
        """
        shape = self.shape
        pages = self._check_pages(k_pages)
        checks.expect("k_pages", f"the {self.array.shape[0]} pages that are summarised", pages.shape[0],
                      pages.shape[0] == self.array.shape[0])
        new_tokens = MAX_TOKENS if new_tokens is None else check_int("new_tokens", new_tokens, 0, MAX_TOKENS)
        tables = StepTables(seq_lens, block_table)
        views = tables.views()
        checks.check_plan(views, self._device_id)
        with arrays.on_stream(pages.library, self._device_id):
            plan = place(tables, views, shape.page_size)
        lists = plan.batch_size * shape.num_kv_heads
        checks.expect("seq_lens", f"at most {variant.MAX_LISTS} rows times KV heads", lists, lists <= variant.MAX_LISTS)
        touched = min(plan.max_tokens, new_tokens + shape.page_size - 1)
        grid = max(1, -(-(touched // shape.page_size + 1) // variant.WARPS)), lists
        scales_at = 0 if self.scales is None else arrays.view("scales", self.scales).pointer
        head, token = (1, 2) if self.layout == "HND" else (2, 1)
        self._kernel(plan.layout)(
            grid,
            (pages.pointer, arrays.view("summaries", self.array).pointer, scales_at, plan.page_ids, plan.lengths,
             plan.row_begins, pages.strides[0], pages.strides[head], pages.strides[token], plan.batch_size,
             shape.num_kv_heads, plan.stride, pages.shape[0], plan.max_tokens, new_tokens),
            arrays.current_stream(pages.library, self._device_id))  # fmt: skip

    def _kernel(self, layout: TableLayout) -> Kernel:
        if layout not in self._kernels:
            defines = variant.selection_defines(self.shape, self.dtype, self.kind, "maximum", self.summary_dtype)
            self._kernels[layout] = load_kernel("summaries.cu", "pkv_summarize_pages", defines | layout.defines(),
                                                threads=variant.WARPS * 32, overlap=this_gpu().overlaps)
        return self._kernels[layout]

    def _check_pages(self, k_pages: object) -> arrays.ArrayView:
        shape, view = self.shape, arrays.view("k_pages", k_pages)
        inner = (shape.num_kv_heads, shape.page_size) if self.layout == "HND" else (shape.page_size, shape.num_kv_heads)
        checks.expect("k_pages", f"{self.dtype} [num_pages, {inner[0]}, {inner[1]}, {shape.head_dim}] on "
                      f"cuda:{self._device_id}", view, view.dtype == self.dtype and len(view.shape) == 4
                      and view.shape[1:] == (*inner, shape.head_dim) and view.device == self._device_id)  # fmt: skip
        checks.expect("k_pages", "a contiguous last axis, strides in multiples of 8 elements, a 16-byte boundary",
                      f"strides {view.strides}", view.strides[3] == 1 and view.pointer % 16 == 0
                      and all(0 <= stride and stride % 8 == 0 for stride in view.strides[:3]))
        checks.expect("k_pages", "head and token strides of less than 2^31 elements", f"strides {view.strides}",
                      all(stride < 2**31 for stride in view.strides[1:3]))
        return view
