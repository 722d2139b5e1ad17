"""One decode step over several GPUs, each of which holds a part of every row's pages.

Read `sharded_decode`, the face: a step on all ranks of a group. `rank_engine` is one rank's plan and launch; `inbox`
lays out what ranks write to each other. A group says where the ranks are and how they reach each other: `one_process`
(several devices, or ranks that share one), `symmetric_memory` (a process for each GPU, under torchrun) and
`collectives` (no peer access: NCCL carries the states), the latter two by `torch_ranks`. `cache` is a pool that
spreads rows over the ranks.

Which page lies where is pkvsim.schedule.shares'. The kernel is cuda_src/several.cu.
"""
from __future__ import annotations

_HOMES = {
    "CollectiveGroup": "gpu.several.collectives",
    "DeviceGroup": "gpu.several.one_process",
    "RankLost": "gpu.several.rank_engine",
    "ShardedCache": "gpu.several.cache",
    "ShardedDecode": "gpu.several.sharded_decode",
    "SymmetricGroup": "gpu.several.symmetric_memory",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports CuPy or torch only when what needs them is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpu.several' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
