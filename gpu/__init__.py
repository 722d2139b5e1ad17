"""The GPU engine of PersistentKV. Importing it needs no GPU; constructing an engine does."""
from __future__ import annotations

_HOMES = {"DecodeEngine": "gpu.engine", "PagedKVCache": "gpu.kv_cache", "FlashInferDecode": "gpu.flashinfer"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports CuPy only when an engine is asked for, so that CPU tools can use the rest of the package."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpu' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
