"""In which order blocks on disks were used, over a restart: else a pool that opens would give up blocks by their slots,
and with them the beginnings of prompts before the rest."""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import itemgetter

import numpy as np

from gpu.cache.tiers.disks.disk_tier import DiskTier
from pkvsim.memory.blocks.block_index import READY
from pkvsim.memory.memory_pool import MemoryPool


def restore_blocks(pool: MemoryPool, disks: Sequence[DiskTier], *, first: int) -> None:
    """The pool takes in what its tiers from `first` on, those disks, kept. Blocks of which nothing is noted were used
    before all others, in order of their slots."""
    order: list[tuple[int, Hashable]] = []
    for tier, disk in enumerate(disks, first):
        found, uses = disk.files.complete(), disk.files.take_uses().tolist()
        taken = set(pool.restore(tier, found))
        order += [(uses[slot], key) for key, slot in found if key in taken]
    order.sort(key=itemgetter(0))
    pool.touch([key for _, key in reversed(order)])


def order_of_use(pool: MemoryPool) -> dict[Hashable, int]:
    """Of blocks that are there or being written, from 1 on, those used later larger. A prompt that is being written is
    being used, and its beginning was asked for first."""
    entries = [(key, entry) for key in pool.index.keys() if (entry := pool.index.get(key)) is not None]
    ready = sorted(((entry.used, key) for key, entry in entries if entry.state == READY), key=itemgetter(0))
    return {key: at for at, key in enumerate(
        [*(key for _, key in ready), *(key for key, entry in reversed(entries) if entry.state != READY)], 1
    )}  # fmt: skip


def note_uses(pool: MemoryPool, order: dict[Hashable, int], disks: Sequence[DiskTier], *, first: int) -> None:
    """Notes in the directories of disks that are open when the blocks were used that lie on them now, by
    order_of_use()."""
    uses = [np.zeros(disk.files.slots, np.uint64) for disk in disks]
    for key, at in order.items():
        entry = pool.index.get(key)
        if entry is not None and entry.place.tier >= first:
            uses[entry.place.tier - first][entry.place.slot] = at
    for disk, of_slots in zip(disks, uses):
        if disk.files.fd >= 0 and not disk.is_stalled:
            disk.files.note_uses(of_slots)
