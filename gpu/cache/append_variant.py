"""The append kernel's side of CacheWriter: its variants, its launches, its parameters. Needs neither CuPy nor a GPU."""
from __future__ import annotations

from dataclasses import dataclass

from gpu.inputs.arrays import ArrayView
from gpu.kernels.variant import CACHE_TYPES, DTYPES
from pkvsim import DecodeShape
from pkvsim.reference.rope import HALF, ROPE_STYLES, Rope

WARPS = 4  # of a CTA, as in append.cu
WARPS_PER_SM = 16  # worth of work, from which on a warp takes several steps of its token
LANE_ELEMENTS = 16  # of a head that a lane holds
MAX_HEAD_DIM = 32 * LANE_ELEMENTS
LAYOUTS = {"HND": (0, 1, 2), "NHD": (0, 2, 1)}  # where in a pool's shape pages, heads and tokens are
FP8_TYPES = ("float8_e4m3fn", "float8_e5m2")


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


def argument_name(slot: str, kv_dtype: str) -> str:
    """What CacheWriter.append calls the field `slot` of AppendViews."""
    return slot.replace("_scales", "_token_scales" if kv_dtype == "int8" else "_scale")


def defines(shape: DecodeShape, dtype: str, *, kv_dtype: str, head_dim_v: int, rope: Rope | None) -> dict[str, int]:
    """Compile-time constants of append.cu."""
    styles = {style: 1 if style == HALF else 2 for style in ROPE_STYLES}
    return {"DTYPE_BF16": DTYPES[dtype], "CACHE_TYPE": CACHE_TYPES.get(kv_dtype, 0), "HEAD_DIM": shape.head_dim,
            "HEAD_DIM_V": head_dim_v, "ROPE_STYLE": 0 if rope is None else styles[rope.style],
            "ROPE_TABLE": int(rope is not None and rope.inv_freq is None),
            "ROTARY_DIM": 0 if rope is None else rope.rotary_dim}


def lanes_per_head(widest_head_dim: int) -> int:
    """LANES of append.cu: the power of two that holds a head."""
    return 1 << (-(-widest_head_dim // LANE_ELEMENTS) - 1).bit_length()


def chunks_per_token(num_heads: int, widest_head_dim: int, num_tokens: int, num_sms: int) -> int:
    """Warps that share a token of num_heads (K, V and query heads): one for each step of its heads where tokens are
    few, a single one where they fill the GPU."""
    steps = -(-num_heads // (32 // lanes_per_head(widest_head_dim)))
    return min(steps, -(-num_sms * WARPS_PER_SM // max(1, num_tokens)))


def launch_sizes(views: AppendViews, shape: DecodeShape, *, head_dim_v: int, layout: str, max_positions: int,
                 rope_stride: int, num_sms: int) -> tuple[int, tuple[int, ...]]:
    """(CTAs, the integers of gpu.kernels.fields.APPEND) of checked arrays. rope_stride: of the table's rows, else 0."""
    tokens, num_q_heads = views.k_new.shape[0], 0 if views.q is None else shape.num_q_heads
    chunks = chunks_per_token(2 * shape.num_kv_heads + num_q_heads, max(shape.head_dim, head_dim_v), tokens, num_sms)
    strides = [*views.k_new.strides[:2], *views.v_new.strides[:2]]
    for array in (views.q, views.q_out):
        strides += (0, 0) if array is None else array.strides[:2]
    for pool in (views.k_pages, views.v_pages, views.k_scales):
        per_token = pool is not None and len(pool.shape) >= 3  # one FP8 scale on the GPU has no strides
        strides += (pool.strides[axis] for axis in LAYOUTS[layout]) if per_token else (0, 0, 0)
    return -(-tokens * chunks // WARPS), (
        tokens, views.seq_lens.shape[0], shape.num_kv_heads, num_q_heads, shape.page_size, views.k_pages.shape[0],
        views.block_table.shape[1], max_positions, chunks, views.block_table.strides[0], rope_stride, *strides)
