"""Types of a KV cache's elements beside those of the queries, and the scales that 8-bit ones are stored with."""
from __future__ import annotations

import ml_dtypes
import numpy as np

FP8_DTYPES = {"float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2)}
KV_DTYPES = (*FP8_DTYPES, "int8")
KV_SCALES = ("tensor", "page", "token")  # one of all K, and of V; of a page and KV head; of a token and KV head
SCALE_BYTES = 4  # float32


def default_scales(kv_dtype: str) -> str:
    """The kind of scales that gpu.CacheWriter stores a type with."""
    return "token" if kv_dtype == "int8" else "tensor"


def dequantize(pages: np.ndarray, kv_dtype: str, scales: np.ndarray | float) -> np.ndarray:
    """Pages as float64: stored * scale.

    pages [num_pages, num_kv_heads, page_size, dim] of kv_dtype, or their bytes as uint8 (int8 for "int8"). scales: a
    number or float32 [1] of all of them; float32 [num_pages, num_kv_heads] of pages and KV heads; float32 [num_pages,
    num_kv_heads, page_size] of tokens. Raises ValueError naming the argument.
    """
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    stored = FP8_DTYPES.get(kv_dtype, np.dtype(np.int8))
    if pages.dtype not in (stored, np.dtype(np.uint8)):
        raise ValueError(f"pages: expected {stored} or uint8, got {pages.dtype}")
    factors = np.asarray(scales, dtype=np.float64)
    fits = factors.size == 1 or (factors.ndim in (2, 3) and factors.shape == pages.shape[:factors.ndim])
    if not fits:
        raise ValueError(f"scales: expected one, {list(pages.shape[:2])} or {list(pages.shape[:3])}, got {list(factors.shape)}")
    if factors.size == 1:
        factors = factors.reshape(())
    return pages.view(stored).astype(np.float64) * factors.reshape(factors.shape + (1,) * (pages.ndim - factors.ndim))
