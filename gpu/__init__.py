"""The GPU engine of PersistentKV. Importing it needs no GPU; constructing an engine does.

Read `inputs` (arrays of any library, block tables, checks), `kernels` (from cuda_src to a launch) and `engine` (plan
notes where things are, run launches): a step goes through them in this order. `cache` is the pool that an engine reads
and the writer that fills it. `selection` chooses what a step reads of it, `several` spreads a step over GPUs. `routes`
puts FlashInfer's backends beside our schedules and takes the cheapest of a step; `decode_engine` is the face of both.
`drop_ins` are faces that other libraries' callers know; `serve` is a serving loop of our own. `measure`, `calibrate`
and `tune` time all of it, and `as_card` runs all of it as another GPU would. Beside them stand names that callers know
(`torch_op`, `torch_append`, `flash_attn`, `transformers_attention`, `transformers_cache`), whose homes are in
`drop_ins`.

What to decide (where to cut, which route, which page) is asked of pkvsim. torch, CuPy and FlashInfer are imported
where they are used, so that CPU tools can use the rest.
"""
from __future__ import annotations

_HOMES = {
    "BatchDecodeWithPagedKVCacheWrapper": "gpu.drop_ins.flashinfer.wrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "gpu.drop_ins.flashinfer.wrapper",
    "CacheWriter": "gpu.cache.writer",
    "DecodeEngine": "gpu.decode_engine",
    "FlashInferDecode": "gpu.routes.flashinfer_decode",
    "MultiLevelCascadeAttentionWrapper": "gpu.drop_ins.flashinfer.cascade",
    "PagedHeadCache": "gpu.cache.head_pool",
    "PagedKVCache": "gpu.cache.pool",
    "PageList": "pkvsim.schedule.page_lists",
    "PageSelector": "gpu.selection.page_selector",
    "PageSummaries": "gpu.selection.page_summaries",
    "PrefixGroups": "gpu.engine.prefixes",
    "find_prefixes": "gpu.engine.prefixes",
    "flash_attn_with_kvcache": "gpu.drop_ins.flash_attn.with_kvcache",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports CuPy or torch only when what needs them is asked for: CPU tools use the rest of the package."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpu' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
