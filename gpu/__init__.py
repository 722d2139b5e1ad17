"""The GPU engine of PersistentKV. Importing it needs no GPU; constructing an engine does."""
from __future__ import annotations

_HOMES = {
    "BatchDecodeWithPagedKVCacheWrapper": "gpu.batch_decode",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "gpu.batch_decode",
    "CacheWriter": "gpu.append",
    "DecodeEngine": "gpu.engine",
    "FlashInferDecode": "gpu.flashinfer",
    "PagedKVCache": "gpu.kv_cache",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports CuPy or torch only when what needs them is asked for: CPU tools use the rest of the package."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpu' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
