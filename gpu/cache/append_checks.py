"""Checks on what reaches CacheWriter. Every failure is a ValueError that names the argument, before any launch."""
from __future__ import annotations

import math

import numpy as np

from gpu.cache.append_variant import (
    CACHE_TYPES,
    FP8_TYPES,
    LANE_ELEMENTS,
    LAYOUTS,
    MAX_HEAD_DIM,
    AppendViews,
    argument_name,
)
from gpu.inputs import checks as validate
from gpu.inputs.arrays import ArrayView
from gpu.inputs.block_tables import StepTables
from gpu.inputs.checks import expect
from gpu.kernels.variant import DTYPES
from pkvsim import DecodeShape
from pkvsim.reference.rope import Rope
from pkvsim.shapes import check_int


def check_kinds(shape: object, head_dim_v: object, rope: object) -> None:
    """That what a CacheWriter is made with is of the right kind, before anything is asked of it."""
    expect("shape", "a DecodeShape", repr(shape), isinstance(shape, DecodeShape))
    expect("rope", "a pkvsim.reference.rope.Rope or None", repr(rope), rope is None or isinstance(rope, Rope))
    if head_dim_v is not None:
        check_int("head_dim_v", head_dim_v, 1)


def check_writer(shape: DecodeShape, dtype: str, *, kv_dtype: str, layout: str, head_dim_v: int, rope: Rope | None,
                 compute_capability: int) -> None:
    """What a CacheWriter is made with. compute_capability: major * 10 + minor."""
    kv_dtypes = (dtype, *CACHE_TYPES)
    expect("dtype", f"one of {', '.join(DTYPES)}", repr(dtype), isinstance(dtype, str) and dtype in DTYPES)
    expect("kv_dtype", f"one of {', '.join(kv_dtypes)}", kv_dtype, kv_dtype in kv_dtypes)
    expect("layout", f"one of {', '.join(LAYOUTS)}", layout, layout in LAYOUTS)
    expect("device", "compute capability 8.0 or newer", compute_capability / 10, compute_capability >= 80)
    for name, dim in (("head_dim", shape.head_dim), ("head_dim_v", head_dim_v)):
        expect(name, f"a multiple of {LANE_ELEMENTS} up to {MAX_HEAD_DIM}", dim,
               0 < dim <= MAX_HEAD_DIM and dim % LANE_ELEMENTS == 0)
    if rope is not None:
        expect("rope", f"a rotary_dim of at most head_dim, {shape.head_dim}", rope.rotary_dim,
               rope.rotary_dim <= shape.head_dim)


def check_table(table: ArrayView, device: int) -> None:
    """Rope.cos_sin on the GPU."""
    expect("cos_sin", f"float32 on cuda:{device}", table, table.dtype == "float32" and table.device == device)
    expect("cos_sin", "contiguous rows, on a 16-byte boundary", f"strides {table.strides}",
           table.strides[1] == 1 and table.strides[0] % 4 == 0 and table.pointer % 16 == 0)


def split_scale(name: str, scale: object, kv_dtype: str) -> tuple[float, object]:
    """(number, None) or (1, array) of k_scale or v_scale."""
    fp8 = kv_dtype in FP8_TYPES
    if isinstance(scale, (int, float, np.number)):
        expect(name, "a positive number" if fp8 else f"1 with pages of {kv_dtype}", scale,
               0 < scale < math.inf if fp8 else scale == 1)
        return float(scale), None
    expect(name, "a number, or one float32 on the GPU" if fp8 else f"1 with pages of {kv_dtype}", type(scale).__name__,
           fp8 and scale is not None)
    return 1.0, scale


def _check_vectors(name: str, array: ArrayView, element_bytes: int) -> None:
    multiple = 16 // element_bytes
    aligned = all(stride % multiple == 0 for stride, size in zip(array.strides[:-1], array.shape) if size > 1)
    expect(name, f"contiguous elements, other strides in multiples of {multiple}, on a 16-byte boundary",
           f"strides {array.strides} at address % 16 = {array.pointer % 16}",
           array.strides[-1] == 1 and aligned and array.pointer % 16 == 0)


def _check_tokens(name: str, array: ArrayView, dtype: str, tokens: int | None, heads: int, dim: int) -> None:
    expect(name, f"{dtype} [{'num_tokens' if tokens is None else tokens}, {heads}, {dim}]", array,
           array.dtype == dtype and len(array.shape) == 3 and array.shape[1:] == (heads, dim)
           and tokens in (None, array.shape[0]))
    _check_vectors(name, array, 2)


def _check_pages(views: AppendViews, middle: tuple[int, int], dims: tuple[int, int], kv_dtype: str) -> None:
    stored = (kv_dtype, "uint8") if kv_dtype in FP8_TYPES else (kv_dtype,)  # CuPy has no FP8
    for name, pages, dim in (("k_pages", views.k_pages, dims[0]), ("v_pages", views.v_pages, dims[1])):
        expect(name, f"{' or '.join(stored)} [num_pages, {middle[0]}, {middle[1]}, {dim}]", pages,
               pages.dtype in stored and len(pages.shape) == 4 and pages.shape[1:] == (*middle, dim))
        _check_vectors(name, pages, 1 if kv_dtype in CACHE_TYPES else 2)
    found = views.v_pages.shape[0]
    expect("v_pages", f"as many pages as k_pages, {views.k_pages.shape[0]}", found, found == views.k_pages.shape[0])


def _check_scales(views: AppendViews, middle: tuple[int, int], kv_dtype: str) -> None:
    scales = (("k", views.k_scales), ("v", views.v_scales))
    if kv_dtype != "int8":
        for side, array in scales:
            expect(f"{side}_scale", "a number or one float32 on the GPU", array,
                   array is None or array.dtype == "float32" and math.prod(array.shape) == 1)
        return
    want = (views.k_pages.shape[0], *middle)
    for side, array in scales:
        expect(f"{side}_token_scales", f"float32 {list(want)} beside {side}_pages", array,
               array is not None and array.dtype == "float32" and array.shape == want)
    found = views.v_scales.strides
    expect("v_token_scales", f"the strides of k_token_scales, {views.k_scales.strides}", found,
           found == views.k_scales.strides)


def _check_rows(views: AppendViews) -> None:
    lens, table, offsets, tokens = views.seq_lens, views.block_table, views.token_offsets, views.k_new.shape[0]
    expect("seq_lens", "contiguous int32 [batch_size], at least one row", lens,
           lens.dtype == "int32" and len(lens.shape) == 1 and lens.shape[0] > 0
           and (lens.strides == (1,) or lens.shape == (1,)))
    batch = lens.shape[0]
    expect("block_table", f"int32 [{batch}, max_pages]", table,
           table.dtype == "int32" and len(table.shape) == 2 and table.shape[0] == batch)
    expect("block_table", "contiguous rows", f"strides {table.strides}", table.strides[1] == 1 or table.shape[1] <= 1)
    if offsets is None:
        expect("k_new", f"one token per row of seq_lens, {batch}, without token_offsets", tokens, tokens == batch)
    else:
        expect("token_offsets", f"contiguous int32 [{batch + 1}]", offsets,
               offsets.dtype == "int32" and offsets.shape == (batch + 1,) and offsets.strides == (1,))


def check_append(views: AppendViews, *, shape: DecodeShape, dtype: str, head_dim_v: int, kv_dtype: str, layout: str,
                 rotates: bool, max_positions: int | None, device: int) -> None:
    """Shapes, dtypes, strides and places of an append's arrays. max_positions: rows of the Rope's table, or None."""
    _check_tokens("k_new", views.k_new, dtype, None, shape.num_kv_heads, shape.head_dim)
    tokens = views.k_new.shape[0]
    _check_tokens("v_new", views.v_new, dtype, tokens, shape.num_kv_heads, head_dim_v)
    middle = (shape.num_kv_heads, shape.page_size) if layout == "HND" else (shape.page_size, shape.num_kv_heads)
    _check_pages(views, middle, (shape.head_dim, head_dim_v), kv_dtype)
    _check_scales(views, middle, kv_dtype)
    _check_rows(views)
    if max_positions is not None:
        room = (views.block_table.shape[1] - 1) * shape.page_size  # the last page may be there for its first token
        expect("block_table", f"no more pages than cos_sin's {max_positions} positions need", views.block_table,
               room < max_positions)
    for name, array in (("q", views.q), ("q_out", views.q_out)):
        if array is not None:
            expect(name, "None, since queries are only rotated and the writer has no rope", array, rotates)
            expect(name, "None where q is not given", array, views.q is not None)
            _check_tokens(name, array, dtype, tokens, shape.num_q_heads, shape.head_dim)
    library = views.k_new.library
    for slot in AppendViews.__slots__:
        array, name = getattr(views, slot), argument_name(slot, kv_dtype)
        if array is not None:
            expect(name, f"an array on cuda:{device}", array, array.device == device)
            expect(name, f"an array of k_new's library ({library})", array.library, array.library == library)


def check_contents(seq_lens: np.ndarray, block_table: np.ndarray, token_offsets: np.ndarray | None, *, num_tokens: int,
                   page_size: int, num_pages: int) -> None:
    """Lengths, page ids and offsets, on the host."""
    columns = block_table.shape[1]
    expect("seq_lens", "no negative length", int(seq_lens.min()), seq_lens.min() >= 0)
    expect("seq_lens", f"at most {columns * page_size} tokens (block_table has {columns} pages of {page_size})",
           int(seq_lens.max()), seq_lens.max() <= columns * page_size)
    validate.check_page_ids(StepTables(seq_lens, block_table), seq_lens, page_size, num_pages)
    if token_offsets is None:
        return
    counts = np.diff(token_offsets)
    expect("token_offsets", f"offsets that do not fall, from 0 to at most {num_tokens}", token_offsets.tolist(),
           token_offsets[0] == 0 and (counts >= 0).all() and token_offsets[-1] <= num_tokens)
    for row in np.flatnonzero((counts > seq_lens) & (seq_lens > 0)):
        raise ValueError(f"seq_lens[{row}]: expected its {counts[row]} new tokens counted in, got {seq_lens[row]}")
