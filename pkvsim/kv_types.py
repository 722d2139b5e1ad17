"""Types of a KV cache's elements beside those of the queries, and the scales that 8-bit ones are stored with."""
from __future__ import annotations

KV_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
KV_SCALES = ("tensor", "page", "token")  # one of all K, and of V; of a page and KV head; of a token and KV head
SCALE_BYTES = 4  # float32


def default_scales(kv_dtype: str) -> str:
    """The kind of scales that gpu.CacheWriter stores a type with."""
    return "token" if kv_dtype == "int8" else "tensor"
