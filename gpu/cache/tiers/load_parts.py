"""What a load asks host memory and each disk for, and which thread asks for host memory's copies."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gpu.cache.tiers.disks.disk_jobs import ReadJob
from gpu.cache.tiers.handles import LoadHandle
from gpu.cache.tiers.host_arena import HostArena
from pkvsim.memory.memory_pool import Read

# Loads of more from host memory are asked for aside, by a thread of the cache. A thread that wakes may wait 5 ms for
# Python's lock (sys.getswitchinterval()), which is what copies of so many bytes take a PCIe 5.0 x16 link at 54 GB/s:
# a shorter load would have arrived by then, and asking for it takes its caller less than that.
LONG_LOAD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class HostBlocks:
    """Blocks of a load that lie in host memory: addresses [n] int64; blocks [n] int64: which of the load's they are."""

    addresses: np.ndarray
    blocks: np.ndarray


def is_long(blocks: int, block_bytes: int) -> bool:
    """Whether a load of so many blocks of host memory is asked for aside."""
    return blocks * block_bytes > LONG_LOAD_BYTES


def split_load(
    handle: LoadHandle, reads: Sequence[Read], arenas: Sequence[HostArena], num_disks: int
) -> tuple[HostBlocks, list[list[ReadJob]]]:  # fmt: skip
    """The load's blocks of host memory, whose arenas are the first tiers, and a list of jobs for each disk."""
    tiers, slots = np.array([read.place for read in reads], np.int64).reshape(-1, 2).T
    blocks = np.flatnonzero(tiers < len(arenas))
    addresses = np.empty(len(blocks), np.int64)
    for tier, arena in enumerate(arenas):
        mine = tiers[blocks] == tier
        addresses[mine] = arena.addresses(slots[blocks[mine]])
    jobs = [
        [ReadJob(reads[at].place.slot, reads[at].key, at, handle._take, handle._ended)
         for at in np.flatnonzero(tiers == tier).tolist()]
        for tier in range(len(arenas), len(arenas) + num_disks)
    ]  # fmt: skip
    return HostBlocks(addresses, blocks), jobs


def give(threads: ThreadPoolExecutor, task: Callable[..., None], *arguments: object, **options: object) -> None:
    """Has the task done by those threads. Where the main thread has ended they take no more, and this one does it."""
    try:
        threads.submit(task, *arguments, **options)
    except RuntimeError:
        task(*arguments, **options)
