"""CacheWriter: new tokens' K and V into their pages, rotated and quantised on the way, in one launch."""
from __future__ import annotations

import cupy

from gpu.cache import append_checks as checks
from gpu.cache.append_variant import WARPS, AppendViews, argument_name, defines, launch_sizes
from gpu.inputs import arrays
from gpu.kernels.compile import load_kernel
from gpu.kernels.this_gpu import this_gpu
from pkvsim import DecodeShape
from pkvsim.reference.rope import Rope, turns_per_position
from pkvsim.shapes import MAX_TOKENS


class CacheWriter:
    """Appends to a paged KV cache for one head shape, dtype and kind of cache.

    There is nothing to plan: lengths, tables and offsets are read on the GPU, so an append captured in a CUDA graph,
    alone or with the decode that follows, goes on with whatever they hold at a replay. The graph's arrays may be larger
    than a step: rows of length 0 and tokens past the last offset are passed over.

    A writer has no workspace: it may be used on several streams.
    """

    def __init__(self, shape: DecodeShape, dtype: str = "float16", *, kv_dtype: str | None = None, layout: str = "HND",
                 head_dim_v: int | None = None, rope: Rope | None = None) -> None:
        """
        dtype: of the tokens and queries, "float16" or "bfloat16".
        kv_dtype: of the pages, by default dtype; "float8_e4m3fn" or "float8_e5m2" (uint8 pages serve as well) with one
        scale each for K and V; "int8" with a scale per token and head.
        layout: of the pages, "HND" [num_pages, num_kv_heads, page_size, dim] or "NHD" [num_pages, page_size,
        num_kv_heads, dim]. head_dim_v: of V, where it is not shape.head_dim.
        rope: rotates K and queries; its table, where it has one, must be on this GPU.

        Raises ValueError naming the argument.
        """
        gpu = this_gpu()
        checks.check_kinds(shape, head_dim_v, rope)
        self.shape, self.dtype, self.layout, self.rope = shape, dtype, layout, rope
        self.kv_dtype = dtype if kv_dtype is None else kv_dtype
        self.head_dim_v = shape.head_dim if head_dim_v is None else head_dim_v
        self.device_id = cupy.cuda.Device().id
        checks.check_writer(shape, dtype, kv_dtype=self.kv_dtype, layout=layout, head_dim_v=self.head_dim_v, rope=rope,
                            compute_capability=gpu.compute_capability)
        self._num_sms = gpu.num_sms
        self._rope_array, self._rope_at, self._rope_stride, self._max_positions = self._place_rope(rope)
        constants = defines(shape, dtype, kv_dtype=self.kv_dtype, head_dim_v=self.head_dim_v, rope=rope)
        self._kernel = load_kernel("append.cu", "pkv_append", constants, threads=WARPS * 32, overlap=gpu.overlaps)
        self._checked: list | None = None
        self._grid = 0
        self._sizes: tuple[int, ...] = ()
        self._library: str | None = None

    def _place_rope(self, rope: Rope | None) -> tuple[object, int, int, int]:
        """(array to keep alive, address, stride of its rows, positions it serves) of the angles on the GPU."""
        if rope is None:
            return None, 0, 0, MAX_TOKENS
        if rope.inv_freq is not None:
            turns = cupy.asarray(turns_per_position(arrays.to_host("inv_freq", rope.inv_freq)))
            cupy.cuda.get_current_stream().synchronize()  # the first append may be on another stream
            return turns, turns.data.ptr, 0, MAX_TOKENS
        table = arrays.view("cos_sin", rope.cos_sin)
        checks.check_table(table, self.device_id)
        return rope.cos_sin, table.pointer, table.strides[0], table.shape[0]

    def append(self, k_new: object, v_new: object, k_pages: object, v_pages: object = None, *, seq_lens: object,
               block_table: object, token_offsets: object = None, q: object = None, q_out: object = None,
               k_scale: object = 1.0, v_scale: object = 1.0, k_token_scales: object = None,
               v_token_scales: object = None, validate: bool = False) -> object:
        """Writes a step's new tokens, on the caller's current stream. All arrays are on the GPU, CuPy or torch alike.

        k_new, v_new [num_tokens, num_kv_heads, dim] of dtype, also slices of a fused projection.
        k_pages, v_pages as `layout` says, of any page, head and token strides, or k_pages alone a combined
        [num_pages, 2, ...].
        seq_lens [batch_size] int32: tokens of each row, the new ones counted in. block_table [batch_size, max_pages]
        int32. token_offsets [batch_size + 1] int32: row r appends tokens [token_offsets[r], token_offsets[r + 1]),
        which take its last positions; without them token i is row i's, at position seq_lens[i] - 1.
        q [num_tokens, num_q_heads, head_dim]: rotated to q_out, in place by default.
        k_scale, v_scale: of FP8 pages, which hold x / scale, saturated; numbers, or one float32 each on the GPU.
        k_token_scales, v_token_scales: of int8 pages, float32 of the pages' shape less the last axis; written.
        validate=True copies lengths, table and offsets to the host and checks them. Without it a token whose row, page
        or position is not there is passed over: its query is not rotated, its place in q_out keeps what it held.

        Returns q_out, or None without q. Raises ValueError naming the argument, before any launch.
        """
        if v_pages is None:
            k_pages, v_pages = arrays.split_combined(k_pages)
        k_number, k_scales = checks.split_scale("k_scale", k_scale, self.kv_dtype)
        v_number, v_scales = checks.split_scale("v_scale", v_scale, self.kv_dtype)
        if self.kv_dtype == "int8":
            k_scales, v_scales = k_token_scales, v_token_scales
        elif k_token_scales is not None or v_token_scales is not None:
            raise ValueError(f"k_token_scales, v_token_scales: expected None with pages of {self.kv_dtype}")
        q_out = q if q_out is None else q_out
        given = k_new, v_new, k_pages, v_pages, seq_lens, block_table, token_offsets, q, q_out, k_scales, v_scales
        addresses, keys = arrays.fingerprints(given)
        if keys != self._checked:
            self._check(*given)
            self._checked = keys
        if validate:
            where = seq_lens, block_table, token_offsets
            host = (None if array is None else arrays.to_host("", array) for array in where)
            checks.check_contents(*host, num_tokens=k_new.shape[0], page_size=self.shape.page_size,
                                  num_pages=k_pages.shape[0])
        if self._grid:
            k, v, k_at, v_at, lens, table, offsets, q_at, q_out_at, k_scales_at, v_scales_at = addresses
            pointers = (k, v, q_at, q_out_at, k_at, v_at, k_scales_at, v_scales_at, lens, table, offsets, self._rope_at)
            factor = 1.0 if self.rope is None else self.rope.factor
            self._kernel(self._grid, (*pointers, *self._sizes, factor, k_number, v_number),
                         arrays.current_stream(self._library, self.device_id))
        return q_out

    def _check(self, *given: object) -> None:
        """Checks a step's arrays and notes what the launches of all such steps have in common."""
        shape, table_only = self.shape, self.rope is not None and self.rope.inv_freq is None
        names = [argument_name(slot, self.kv_dtype) for slot in AppendViews.__slots__]
        views = AppendViews(*(None if array is None else arrays.view(name, array) for name, array in zip(names, given)))
        checks.check_append(views, shape=shape, dtype=self.dtype, head_dim_v=self.head_dim_v, kv_dtype=self.kv_dtype,
                            layout=self.layout, rotates=self.rope is not None, device=self.device_id,
                            max_positions=self._max_positions if table_only else None)
        self._grid, self._sizes = launch_sizes(views, shape, head_dim_v=self.head_dim_v, layout=self.layout,
                                               max_positions=self._max_positions, rope_stride=self._rope_stride,
                                               num_sms=self._num_sms)
        self._library = views.k_new.library
