"""CacheWriter: new tokens' K and V into their pages, rotated and quantised on the way, in one launch."""
from __future__ import annotations

import math

import cupy
import numpy as np

from gpu import append_checks as checks
from gpu import arrays
from gpu.append_config import CACHE_TYPES, LANE_ELEMENTS, MAX_HEAD_DIM, SIGNATURE, WARPS, chunks_per_token, defines
from gpu.config import DTYPES
from gpu.kernels import load_kernel
from pkvsim import DecodeShape
from pkvsim.rope import Rope, turns_per_position
from pkvsim.shapes import MAX_TOKENS

FP8 = ("float8_e4m3fn", "float8_e5m2")


class CacheWriter:
    """Appends to a paged KV cache for one head shape, dtype and kind of cache.

    There is nothing to plan: lengths, tables and offsets are read on the GPU, so an append captured in a CUDA graph, alone or
    with the decode that follows, goes on with whatever they hold at a replay. The graph's arrays may be larger than a
    step: rows of length 0 and tokens past the last offset are passed over.

    One writer may be used on several streams.
    """

    def __init__(self, shape: DecodeShape, dtype: str = "float16", *, kv_dtype: str | None = None, layout: str = "HND",
                 head_dim_v: int | None = None, rope: Rope | None = None) -> None:
        """
        dtype: of the tokens and queries, "float16" or "bfloat16". kv_dtype: of the pages, by default dtype; "float8_e4m3fn"
        or "float8_e5m2" (uint8 pages serve as well) with one scale each for K and V; "int8" with a scale per token and head.
        layout: of the pages, "HND" [num_pages, num_kv_heads, page_size, dim] or "NHD" [num_pages, page_size, num_kv_heads, dim].
        head_dim_v: of V where it is not shape.head_dim. rope: rotates K and queries; a table must be on this GPU.

        Raises ValueError naming the argument.
        """
        current = cupy.cuda.Device()
        capability = int(current.compute_capability)
        kv_dtype, head_dim_v = kv_dtype or dtype, head_dim_v or shape.head_dim
        checks.expect("dtype", f"one of {', '.join(DTYPES)}", dtype, dtype in DTYPES)
        checks.expect("kv_dtype", f"one of {', '.join((dtype, *CACHE_TYPES))}", kv_dtype, kv_dtype in (dtype, *CACHE_TYPES))
        checks.expect("layout", f"one of {', '.join(checks.LAYOUTS)}", layout, layout in checks.LAYOUTS)
        checks.expect("device", "compute capability 8.0 or newer", capability / 10, capability >= 80)
        for name, dim in (("head_dim", shape.head_dim), ("head_dim_v", head_dim_v)):
            checks.expect(name, f"a multiple of {LANE_ELEMENTS} up to {MAX_HEAD_DIM}", dim,
                          0 < dim <= MAX_HEAD_DIM and dim % LANE_ELEMENTS == 0)
        self.shape, self.dtype, self.kv_dtype, self.layout, self.head_dim_v = shape, dtype, kv_dtype, layout, head_dim_v
        self.rope = rope
        self.device_id = current.id
        self._num_sms = current.attributes["MultiProcessorCount"]
        self._rope_array, self._rope_at, self._rope_stride, self._max_positions = self._place_rope(rope)
        self._kernel = load_kernel("append.cu", "pkv_append", SIGNATURE,
                                   defines(shape, dtype, kv_dtype=kv_dtype, head_dim_v=head_dim_v, rope=rope),
                                   threads=WARPS * 32, overlap=capability >= 90)
        self._checked: tuple | None = None
        self._grid, self._sizes, self._library = 0, (), None

    def _place_rope(self, rope: Rope | None) -> tuple[object, int, int, int]:
        """(array to keep alive, address, stride of its rows, positions it serves) of the angles on the GPU."""
        if rope is None:
            return None, 0, 0, MAX_TOKENS
        checks.expect("rope", f"a rotary_dim of at most head_dim, {self.shape.head_dim}", rope.rotary_dim,
                      rope.rotary_dim <= self.shape.head_dim)
        if rope.inv_freq is not None:
            turns = cupy.asarray(turns_per_position(arrays.to_host("inv_freq", rope.inv_freq)))
            cupy.cuda.get_current_stream().synchronize()  # the first append may be on another stream
            return turns, turns.data.ptr, 0, MAX_TOKENS
        table = arrays.view("cos_sin", rope.cos_sin)
        checks.expect("cos_sin", f"float32 on cuda:{self.device_id}", table,
                      table.dtype == "float32" and table.device == self.device_id)
        checks.expect("cos_sin", "contiguous rows, on a 16-byte boundary", f"strides {table.strides}",
                      table.strides[1] == 1 and table.strides[0] % 4 == 0 and table.pointer % 16 == 0)
        return rope.cos_sin, table.pointer, table.strides[0], table.shape[0]

    def append(self, k_new: object, v_new: object, k_pages: object, v_pages: object = None, *, seq_lens: object,
               block_table: object, token_offsets: object = None, q: object = None, q_out: object = None,
               k_scale: object = 1.0, v_scale: object = 1.0, k_token_scales: object = None, v_token_scales: object = None,
               validate: bool = False) -> object:
        """Writes the step's new tokens, on the caller's current stream. All arrays on the GPU, CuPy or torch, all alike.

        k_new, v_new [num_tokens, num_kv_heads, dim] of dtype, also slices of a fused projection. k_pages, v_pages as `layout`
        says, of any page, head and token strides, or k_pages alone a combined [num_pages, 2, ...].
        seq_lens [batch_size] int32: tokens of each row with the new ones; block_table [batch_size, max_pages] int32.
        token_offsets [batch_size + 1] int32: row r appends tokens [token_offsets[r], token_offsets[r + 1]), which take its last
        positions; without them token i is row i's, at position seq_lens[i] - 1.
        q [num_tokens, num_q_heads, head_dim]: rotated to q_out, in place by default.
        k_scale, v_scale: of FP8, a number or one float32 on the GPU, read at the launch; pages hold x / scale, saturated.
        k_token_scales, v_token_scales: of int8, float32 of the pages' shape less the last axis, written.
        validate=True copies lengths, table and offsets to the host and checks them. Otherwise a token whose row, page or
        position is not there is passed over, its query too.

        Returns q_out, None without q. Raises ValueError naming the argument, before any launch.
        """
        if v_pages is None:
            k_pages, v_pages = self._split(k_pages)
        fp8 = self.kv_dtype in FP8
        k_number, k_scales = _scale("k_scale", k_scale, fp8)
        v_number, v_scales = _scale("v_scale", v_scale, fp8)
        if self.kv_dtype == "int8":
            k_scales, v_scales = k_token_scales, v_token_scales
        elif k_token_scales is not None or v_token_scales is not None:
            raise ValueError(f"k_token_scales, v_token_scales: expected None, since only int8 pages have them, got pages of {self.kv_dtype}")
        q_out = q if q_out is None else q_out
        given = k_new, v_new, k_pages, v_pages, seq_lens, block_table, token_offsets, q, q_out, k_scales, v_scales
        marks = [arrays.fingerprint(array) for array in given]
        keys = [type(array) if key is None else key for array, (_, key) in zip(given, marks)]
        if keys != self._checked:
            self._check(*given)
            self._checked = keys
        if validate:
            host = [None if array is None else arrays.to_host("", array) for array in (seq_lens, block_table, token_offsets)]
            checks.check_contents(*host, num_tokens=k_new.shape[0], page_size=self.shape.page_size, num_pages=k_pages.shape[0])
        if self._grid:
            (k, _), (v, _), (kp, _), (vp, _), (lens, _), (table, _), (offsets, _), (q_at, _), (out, _), (ks, _), (vs, _) = marks
            pointers = k, v, q_at, out, kp, vp, ks, vs, lens, table, offsets, self._rope_at
            factor = 1.0 if self.rope is None else self.rope.factor
            self._kernel(self._grid, (*pointers, *self._sizes, factor, k_number, v_number),
                         arrays.current_stream(self._library, self.device_id))
        return q_out

    def _split(self, combined: object) -> tuple[object, object]:
        arrays.view("k_pages", combined)
        if len(combined.shape) != 5 or combined.shape[1] != 2:
            raise ValueError(f"v_pages: expected pages, or a combined k_pages [num_pages, 2, ...], got None and {list(combined.shape)}")
        return combined[:, 0], combined[:, 1]

    def _check(self, *given: object) -> None:
        names = checks.AppendViews.__slots__
        views = checks.AppendViews(*(None if array is None else arrays.view(name, array) for name, array in zip(names, given)))
        table_rows = self._max_positions if self.rope is not None and self.rope.inv_freq is None else None
        checks.check_append(views, shape=self.shape, dtype=self.dtype, head_dim_v=self.head_dim_v, kv_dtype=self.kv_dtype,
                            layout=self.layout, rotary_dim=0 if self.rope is None else self.rope.rotary_dim,
                            max_positions=table_rows, device=self.device_id)
        tokens, num_q_heads = views.k_new.shape[0], 0 if views.q is None else self.shape.num_q_heads
        chunks = chunks_per_token(2 * self.shape.num_kv_heads + num_q_heads, max(self.shape.head_dim, self.head_dim_v), tokens,
                                  self._num_sms)
        pages = views.k_pages.shape[0]
        strides = [*views.k_new.strides[:2], *views.v_new.strides[:2]]
        for array in (views.q, views.q_out):
            strides += (0, 0) if array is None else array.strides[:2]
        scales = views.k_scales.strides if self.kv_dtype == "int8" else (0, 0, 0)
        order = (0, 1, 2) if self.layout == "HND" else (0, 2, 1)
        for per_page in (views.k_pages.strides, views.v_pages.strides, scales):
            strides += (per_page[axis] for axis in order)
        self._grid = -(-tokens * chunks // WARPS)
        self._sizes = (tokens, views.seq_lens.shape[0], self.shape.num_kv_heads, num_q_heads, self.shape.page_size, pages,
                       views.block_table.shape[1], self._max_positions, chunks, views.block_table.strides[0], self._rope_stride, *strides)
        self._library = views.k_new.library


def _scale(name: str, scale: object, fp8: bool) -> tuple[float, object]:
    """(number, None) or (1, array) of a scale; ValueError where it is no positive number or the pages are not FP8."""
    if not isinstance(scale, (int, float, np.number)):
        checks.expect(name, "a number, or one float32 on the GPU" if fp8 else "1, since only FP8 pages have it", type(scale).__name__,
                      fp8 and scale is not None)
        return 1.0, scale
    checks.expect(name, "a positive number" if fp8 else "1, since only FP8 pages have it", scale,
                  0 < scale < math.inf if fp8 else scale == 1)
    return float(scale), None
