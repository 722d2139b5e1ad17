"""GPU memory: how much of it a script may plan with, and how much it took at most."""
from __future__ import annotations

import gc
from dataclasses import dataclass

GIB = 2**30
# The rest is for what stands beside a pool: FlashInfer's workspaces of 384 MiB each, references, queries and outputs.
POOL_SHARE = 2 / 3


class NoRoom(ValueError):
    """A pool of pages is larger than memory, or too small for what it was to hold; the message begins with pool-gib."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of what a script would like to have it gets, in GiB."""

    wanted_gib: float
    granted_gib: float
    free_gib: float

    @property
    def shrunk(self) -> bool:
        return self.granted_gib < self.wanted_gib

    def __str__(self) -> str:
        if not self.shrunk:
            return f"pool {self.granted_gib:.3g} GiB"
        return (f"pool {self.granted_gib:.3g} GiB in place of {self.wanted_gib:g}: "
                f"{self.free_gib:.3g} GiB of the GPU are free")


def free_bytes() -> int:
    """GPU memory that is free once PyTorch has given back what it holds unused, circles of garbage included."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def budget(default_gib: float, asked_gib: float | None = None, *, beside: float = 1.0) -> Budget:
    """What a pool may take: `default_gib`, or what fits of it, or exactly what was asked for.

    beside: what the script allocates in proportion to its pool, the pool included.
    Raises NoRoom where more is asked for than is free.
    """
    free = free_bytes() / GIB
    if asked_gib is None:
        return Budget(default_gib, min(default_gib, free * POOL_SHARE / beside), free)
    if asked_gib * beside > free:
        raise NoRoom(f"pool-gib: expected at most {free / beside:.3g}, of which GPU memory has room, "
                     f"got {asked_gib:g}")
    return Budget(asked_gib, asked_gib, free)


def expect_room(num_bytes: int, what: str) -> None:
    """Raises NoRoom where a pool has not left so many bytes for what stands beside it."""
    free = free_bytes()
    if num_bytes > free:
        raise NoRoom(f"pool-gib: expected a pool beside which {num_bytes / GIB:.3g} GiB of {what} have room, "
                     f"got one that leaves {free / GIB:.3g}")


def fitting(wanted: int, *, bytes_each: int) -> int:
    """As many as `wanted` of what takes so many bytes, or as POOL_SHARE of the free memory holds; at least 1."""
    return max(1, min(wanted, int(free_bytes() * POOL_SHARE) // bytes_each))


def peak_bytes() -> int:
    """The most that PyTorch and CuPy held in this process; CuPy's pool as it is now, since it seldom shrinks."""
    import cupy
    import torch

    return torch.cuda.max_memory_reserved() + cupy.get_default_memory_pool().total_bytes()


def peak_line() -> str:
    """What every script ends with."""
    from gpu.kernels.this_gpu import this_gpu

    gpu = this_gpu()
    return f"peak GPU memory {peak_bytes() / GIB:.2f} GiB of {gpu.memory_bytes / GIB:.1f} ({gpu})"
