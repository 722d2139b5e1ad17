"""Checks on what reaches CacheWriter. Every failure is a ValueError that names the argument, before any launch."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu import validate
from gpu.append_config import CACHE_TYPES
from gpu.arrays import ArrayView
from pkvsim import DecodeShape

LAYOUTS = ("HND", "NHD")
STORED_AS = {"float8_e4m3fn": ("float8_e4m3fn", "uint8"), "float8_e5m2": ("float8_e5m2", "uint8")}  # CuPy has no FP8


@dataclass(frozen=True, slots=True)
class AppendViews:
    """The arrays of one append, described; None where one was not given."""

    k_new: ArrayView
    v_new: ArrayView
    k_pages: ArrayView
    v_pages: ArrayView
    seq_lens: ArrayView
    block_table: ArrayView
    token_offsets: ArrayView | None
    q: ArrayView | None
    q_out: ArrayView | None
    k_scales: ArrayView | None  # k_token_scales of INT8 pages; k_scale of FP8 pages where it is on the GPU
    v_scales: ArrayView | None

    def given(self) -> list[tuple[str, ArrayView]]:
        return [(name, view) for name in self.__slots__ if (view := getattr(self, name)) is not None]


def expect(name: str, expected: str, got: object, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_vectors(name: str, array: ArrayView, element_bytes: int) -> None:
    multiple = 16 // element_bytes
    aligned = all(stride % multiple == 0 for stride, size in zip(array.strides[:-1], array.shape) if size > 1)
    expect(name, f"contiguous elements, other strides in multiples of {multiple}, on a 16-byte boundary",
           f"strides {array.strides} at address % 16 = {array.pointer % 16}",
           array.strides[-1] == 1 and aligned and array.pointer % 16 == 0)


def _check_tokens(name: str, array: ArrayView, dtype: str, tokens: int | None, heads: int, dim: int) -> None:
    count = "num_tokens" if tokens is None else tokens
    expect(name, f"{dtype} [{count}, {heads}, {dim}]", array, array.dtype == dtype and len(array.shape) == 3
           and array.shape[1:] == (heads, dim) and tokens in (None, array.shape[0]))
    _check_vectors(name, array, 2)


def _check_pages(views: AppendViews, shape: DecodeShape, head_dim_v: int, kv_dtype: str, layout: str) -> None:
    stored = STORED_AS.get(kv_dtype, (kv_dtype,))
    middle = (shape.num_kv_heads, shape.page_size) if layout == "HND" else (shape.page_size, shape.num_kv_heads)
    for name, pages, dim in (("k_pages", views.k_pages, shape.head_dim), ("v_pages", views.v_pages, head_dim_v)):
        expect(name, f"{' or '.join(stored)} [num_pages, {middle[0]}, {middle[1]}, {dim}] ({layout})", pages,
               pages.dtype in stored and len(pages.shape) == 4 and pages.shape[1:] == (*middle, dim))
        _check_vectors(name, pages, 1 if kv_dtype in CACHE_TYPES else 2)
    num_pages = views.k_pages.shape[0]
    expect("v_pages", f"as many pages as k_pages, {num_pages}", views.v_pages.shape[0], views.v_pages.shape[0] == num_pages)
    scales = (("k", views.k_scales), ("v", views.v_scales))
    if kv_dtype == "int8":
        for side, array in scales:
            name, want = f"{side}_token_scales", (num_pages, *middle)
            expect(name, f"float32 {list(want)} beside {side}_pages", array,
                   array is not None and array.dtype == "float32" and array.shape == want)
        expect("v_token_scales", f"the strides of k_token_scales, {views.k_scales.strides}", views.v_scales.strides,
               views.v_scales.strides == views.k_scales.strides)
    else:
        for side, array in scales:
            if array is not None:
                expect(f"{side}_scale", "a number or one float32 on the GPU", array,
                       array.dtype == "float32" and int(np.prod(array.shape)) == 1)


def check_append(views: AppendViews, *, shape: DecodeShape, dtype: str, head_dim_v: int, kv_dtype: str, layout: str,
                 rotary_dim: int, max_positions: int | None, device: int) -> None:
    """Shapes, dtypes, strides and places of an append's arrays. rotary_dim: 0 without a Rope. max_positions: rows of
    the Rope's table, None without one."""
    _check_tokens("k_new", views.k_new, dtype, None, shape.num_kv_heads, shape.head_dim)
    tokens = views.k_new.shape[0]
    _check_tokens("v_new", views.v_new, dtype, tokens, shape.num_kv_heads, head_dim_v)
    _check_pages(views, shape, head_dim_v, kv_dtype, layout)
    lens, table, offsets = views.seq_lens, views.block_table, views.token_offsets
    expect("seq_lens", "contiguous int32 [batch_size], at least one row", lens,
           lens.dtype == "int32" and len(lens.shape) == 1 and lens.shape[0] > 0 and (lens.strides == (1,) or lens.shape == (1,)))
    batch = lens.shape[0]
    expect("block_table", f"int32 [{batch}, max_pages]", table,
           table.dtype == "int32" and len(table.shape) == 2 and table.shape[0] == batch)
    expect("block_table", "contiguous rows", f"strides {table.strides}", table.strides[1] == 1 or table.shape[1] <= 1)
    if offsets is None:
        expect("k_new", f"one token per row of seq_lens, {batch}, where token_offsets are not given", tokens, tokens == batch)
    else:
        expect("token_offsets", f"contiguous int32 [{batch + 1}]", offsets,
               offsets.dtype == "int32" and offsets.shape == (batch + 1,) and offsets.strides == (1,))
    if max_positions is not None:
        room = (table.shape[1] - 1) * shape.page_size  # the last page may be there for its first tokens only
        expect("block_table", f"no more pages than the {max_positions} positions of cos_sin need", table, room < max_positions)
    for name, array in (("q", views.q), ("q_out", views.q_out)):
        if array is not None:
            expect(name, "None, since queries are only rotated and the writer has no rope", array, rotary_dim > 0)
            expect(name, "None where q is not given", array, views.q is not None)
            _check_tokens(name, array, dtype, tokens, shape.num_q_heads, shape.head_dim)
    scale_name = "_token_scales" if kv_dtype == "int8" else "_scale"
    for slot, array in views.given():
        name = slot.replace("_scales", scale_name)
        expect(name, f"an array on cuda:{device}", array, array.device == device)
        expect(name, f"an array of the same library as k_new ({views.k_new.library})", array.library,
               array.library == views.k_new.library)


def check_contents(seq_lens: np.ndarray, block_table: np.ndarray, token_offsets: np.ndarray | None, *, num_tokens: int,
                   page_size: int, num_pages: int) -> None:
    """Lengths, page ids and offsets, on the host."""
    columns = block_table.shape[1]
    expect("seq_lens", "no negative length", int(seq_lens.min()), seq_lens.min() >= 0)
    expect("seq_lens", f"at most {columns * page_size} tokens (block_table has {columns} pages of {page_size})",
           int(seq_lens.max()), seq_lens.max() <= columns * page_size)
    validate.check_page_ids(block_table, seq_lens, page_size, num_pages)
    if token_offsets is None:
        return
    counts = np.diff(token_offsets)
    expect("token_offsets", f"offsets that do not fall, from 0 to at most {num_tokens}", token_offsets.tolist(),
           token_offsets[0] == 0 and (counts >= 0).all() and token_offsets[-1] <= num_tokens)
    short = np.flatnonzero((counts > seq_lens) & (seq_lens > 0))
    if len(short):
        row = int(short[0])
        raise ValueError(f"seq_lens[{row}]: expected the row's {int(counts[row])} new tokens counted in, got {int(seq_lens[row])}")
