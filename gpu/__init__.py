"""The GPU engine of PersistentKV. Importing it needs no GPU; constructing an engine does."""
from __future__ import annotations

_HOMES = {
    "BatchDecodeWithPagedKVCacheWrapper": "gpu.drop_ins.flashinfer_wrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "gpu.drop_ins.flashinfer_wrapper",
    "CacheWriter": "gpu.cache.writer",
    "DecodeEngine": "gpu.engine.schedule_engine",
    "FlashInferDecode": "gpu.routes.flashinfer_decode",
    "PagedKVCache": "gpu.cache.pool",
    "PrefixGroups": "gpu.engine.prefixes",
    "find_prefixes": "gpu.engine.prefixes",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports CuPy or torch only when what needs them is asked for: CPU tools use the rest of the package."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpu' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
