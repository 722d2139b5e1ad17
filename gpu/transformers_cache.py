"""A Transformers cache of pages; gpu.drop_ins.transformers_cache is its home."""
from gpu.drop_ins.transformers_cache import PagedCache

__all__ = ["PagedCache"]
