"""Writing new tokens into a paged KV cache, as the GPU's append kernel must: addresses, RoPE, rounding to the cache's
type.

precision=float64 is what is meant. precision=float32 rounds wherever the kernel does; with Rope.cos_sin or without a
Rope its results are then the kernel's, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pkvsim.kv_types import KV_DTYPES
from pkvsim.reference.rope import HALF, Rope
from pkvsim.shapes import describe

FP8_DTYPES = {"float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2)}
INT8_STEPS = 127  # INT8 has so many steps between 0 and a head's largest magnitude.


@dataclass(frozen=True, slots=True, eq=False)
class TokenSlots:
    """Where new tokens go; the arrays are parallel, one entry for each token that is written."""

    token: np.ndarray  # index among the new tokens
    position: np.ndarray  # in its row, from 0
    page: np.ndarray  # id in the pool
    slot: np.ndarray  # within the page


def token_slots(
    seq_lens: np.ndarray,
    block_table: np.ndarray,
    *,
    num_tokens: int,
    num_pages: int,
    page_size: int,
    token_offsets: np.ndarray | None = None,
    max_positions: int | None = None,
) -> TokenSlots:
    """Positions and pages of `num_tokens` new tokens.

    seq_lens [batch_size]: tokens of each row once the new ones are in it. token_offsets [batch_size + 1]: row r has
    the tokens [token_offsets[r], token_offsets[r + 1]), which take its last positions; by default token i is row i's
    only one. Left out, as the kernel leaves them out: tokens past the last offset, of rows of length 0 or shorter
    than their tokens, at positions that block_table [batch_size, max_pages] or max_positions does not reach, and on
    pages not in the pool.
    """
    offsets = np.arange(len(seq_lens) + 1) if token_offsets is None else np.asarray(token_offsets, dtype=np.int64)
    row = np.repeat(np.arange(len(seq_lens)), np.diff(offsets))
    token = int(offsets[0]) + np.arange(len(row))
    position = np.asarray(seq_lens, dtype=np.int64)[row] - (offsets[row + 1] - token)
    reach = block_table.shape[1] * page_size
    live = (
        (token < num_tokens)
        & (position >= 0)
        & (position < (reach if max_positions is None else min(reach, max_positions)))
    )
    page = np.full(len(row), -1, dtype=np.int64)
    page[live] = np.asarray(block_table)[row[live], position[live] // page_size]
    live &= (page >= 0) & (page < num_pages)
    return TokenSlots(token[live], position[live], page[live], position[live] % page_size)


def rotate(x: np.ndarray, position: np.ndarray, rope: Rope, *, precision: type = np.float64) -> np.ndarray:
    """RoPE of x [tokens, heads, head_dim] at position [tokens]; an array of `precision`, not yet rounded to x's
    type."""
    turned: np.ndarray = np.array(x, dtype=precision)
    pairs, dim = rope.rotary_dim // 2, rope.rotary_dim
    if rope.inv_freq is None:
        rows = np.asarray(rope.cos_sin)[position].astype(precision)  # [tokens, rotary_dim]
        cosine, sine = rows[:, None, :pairs], rows[:, None, pairs:]
    else:
        angles = np.outer(position, np.asarray(rope.inv_freq, dtype=np.float64))[:, None]
        cosine, sine = ((wave(angles) * rope.factor).astype(precision) for wave in (np.cos, np.sin))
    first, second = (slice(0, pairs), slice(pairs, dim)) if rope.style == HALF else (slice(0, dim, 2), slice(1, dim, 2))
    a, b = turned[..., first].copy(), turned[..., second].copy()
    turned[..., first] = a * cosine - b * sine
    turned[..., second] = b * cosine + a * sine
    return turned


def quantize_fp8(x: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    """x / scale rounded to the FP8 type, ties to even; beyond its largest number that one. `stored * scale` is x again.

    In float32 the division is a product with the rounded reciprocal.
    """
    fp8 = FP8_DTYPES[dtype]
    largest = float(ml_dtypes.finfo(fp8).max)
    scaled = x * (np.float32(1) / np.float32(scale)) if x.dtype == np.float32 else x / float(scale)
    return np.clip(scaled, -largest, largest).astype(fp8)


def quantize_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of x's shape, float32 scales of its shape less the last axis): largest magnitude / 127 of each head.

    `stored * scale` is x again, within half a scale. A head of zeros has scale 0.
    """
    scale = np.abs(x).max(axis=-1) / x.dtype.type(INT8_STEPS)
    positive = np.where(scale > 0, scale, x.dtype.type(1))[..., None]
    steps = x * (np.float32(1) / positive) if x.dtype == np.float32 else x / positive
    return np.clip(np.rint(steps), -INT8_STEPS, INT8_STEPS).astype(np.int8), scale.astype(np.float32)


def dequantize(pages: np.ndarray, kv_dtype: str, scales: np.ndarray | float) -> np.ndarray:
    """Pages as float64, stored * scale: what pkvsim.reference.attention attends to.

    pages [num_pages, num_kv_heads, page_size, dim] of kv_dtype, or their bytes as uint8. scales: a number or float32
    [1]; of pages and KV heads float32 [num_pages, num_kv_heads]; of tokens [num_pages, num_kv_heads, page_size].
    Raises ValueError naming the argument.
    """
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    stored = FP8_DTYPES.get(kv_dtype, np.dtype(np.int8))
    if pages.ndim != 4 or pages.dtype not in (stored, np.dtype(np.uint8)):
        raise ValueError(f"pages: expected {stored} or uint8 of 4 axes, got {describe(pages)}")
    factors = np.asarray(scales, dtype=np.float64)
    if factors.size == 1:
        factors = factors.reshape(())
    elif factors.shape not in (pages.shape[:2], pages.shape[:3]):
        wanted = f"one, {list(pages.shape[:2])} or {list(pages.shape[:3])}"
        raise ValueError(f"scales: expected {wanted}, got {list(factors.shape)}")
    return pages.view(stored).astype(np.float64) * factors.reshape(factors.shape + (1,) * (4 - factors.ndim))


def append(
    k_new: np.ndarray,
    v_new: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    *,
    seq_lens: np.ndarray,
    block_table: np.ndarray,
    token_offsets: np.ndarray | None = None,
    q: np.ndarray | None = None,
    rope: Rope | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    k_token_scales: np.ndarray | None = None,
    v_token_scales: np.ndarray | None = None,
    precision: type = np.float64,
) -> np.ndarray | None:
    """Writes k_new, v_new [num_tokens, num_kv_heads, dim] into pages [num_pages, num_kv_heads, page_size, dim], in
    place.

    The pages' dtype decides what is written: the tokens' own, float8_e4m3fn or float8_e5m2 of ml_dtypes (with
    k_scale, v_scale), or int8, whose scales go to k_token_scales, v_token_scales [num_pages, num_kv_heads, page_size]
    float32. NHD pages are passed as a transposed view. Returns q [num_tokens, num_q_heads, dim] rotated and rounded
    to its dtype, tokens that are not written as they were; None without q.

    Raises ValueError for pages that fit none of this.
    """
    num_pages, _, page_size, _ = k_pages.shape
    slots = token_slots(
        seq_lens,
        block_table,
        num_tokens=len(k_new),
        num_pages=num_pages,
        page_size=page_size,
        token_offsets=token_offsets,
        max_positions=None if rope is None or rope.cos_sin is None else len(rope.cos_sin),
    )

    def turned(x: np.ndarray) -> np.ndarray:
        picked = x[slots.token].astype(precision)
        return picked if rope is None else rotate(picked, slots.position, rope, precision=precision)

    for name, new, values, pages, scale, token_scales in (
        ("k_pages", k_new, turned(k_new), k_pages, k_scale, k_token_scales),
        ("v_pages", v_new, v_new[slots.token].astype(precision), v_pages, v_scale, v_token_scales),
    ):
        at = slots.page, slice(None), slots.slot
        if pages.dtype == np.int8 and token_scales is not None:
            pages[at], token_scales[at] = quantize_int8(values)
        elif pages.dtype.name in FP8_DTYPES:
            pages[at] = quantize_fp8(values, scale, pages.dtype.name)
        elif pages.dtype == new.dtype:
            pages[at] = values.astype(new.dtype)
        else:
            raise ValueError(
                f"{name}: expected {new.dtype}, int8 or one of {', '.join(FP8_DTYPES)}, got {describe(pages)}"
            )
    if q is None:
        return None
    out = q.copy()
    out[slots.token] = turned(q).astype(q.dtype)
    return out
