"""What a pool keeps over a restart: what host memory holds is written to disks before it goes, while that takes no
longer than it may.

A prompt's blocks are dealt over all devices, and a prefix counts up to its first gap: of a pool whose host memory is
gone, disks have the rest of every prompt and nearly nothing that could be loaded. So a pool that closes in good order
moves blocks to disks, those used last first; where disks are full, for blocks that were used longer ago. As a use of a
block is one of all before it, and those count as used later, what is kept of a prompt is always its beginning: disks
end up with the most recently used blocks of the pool, as many as they have slots, or with a part of these where time is
short.

While it runs the pool writes nothing twice and places prompts as it would without restarts. Copies of host memory's
blocks on disks, written whenever they are idle, would outlive a crash as well, and multiply what disks write (by 8 for
shares of 50 and 7 GB/s) and take as much of their room as host memory has; prompts that begin on disks would be read at
the disks' rate wherever they are short or shared.
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from pkvsim.memory.blocks.block_index import READY
from pkvsim.memory.device_clock import DeviceClock
from pkvsim.memory.memory_pool import MemoryPool
from pkvsim.memory.placement import place


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a pool that closed has kept. kept, left: blocks of host memory that are on disks, and that are not."""

    kept: int
    left: int
    begin_s: float
    end_s: float


def check_flush_s(seconds: float) -> float:
    """ValueError naming the argument unless it is a time, 0 for none and infinity for as long as it takes."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"flush_s: expected seconds >= 0, got {seconds!r}")
    return float(seconds)


def volatile_blocks(pool: MemoryPool) -> list[Hashable]:
    """Blocks that are there now and not after a restart, those worth most first: held ones, then by their last use."""
    entries = ((key, pool.index.get(key)) for key in pool.index.keys())
    found = [
        (entry.holds > 0, entry.used, key) for key, entry in entries
        if entry is not None and entry.state == READY and not pool.tiers[entry.place.tier].is_lasting
    ]  # fmt: skip
    return [key for *_, key in sorted(found, key=lambda one: one[:2], reverse=True)]


def blocks_to_move(pool: MemoryPool) -> list[tuple[Hashable, int]]:
    """(Block, device that outlives a restart) of those to be moved there, in this order: dealt by the rates at which
    these write, so that all of them end together and, wherever time ends, have kept the same beginnings."""
    volatile = volatile_blocks(pool)
    lasting = np.array([tier.is_lasting for tier in pool.tiers]) & (pool.shares.weights > 0)
    room = np.array([pool.index.free_slots(tier) if lasts else 0 for tier, lasts in enumerate(lasting)], np.int64)
    count = min(len(volatile), int(room.sum()))
    if count < len(volatile):
        entries = [entry for entry in map(pool.index.get, pool.index.keys()) if entry is not None and entry.evictable]
        oldest = sorted((entry.used, entry.place.tier) for entry in entries if lasting[entry.place.tier])
        for (used, tier), key in zip(oldest, volatile[count:]):
            entry = pool.index.get(key)
            assert entry is not None  # it is there
            if not entry.holds and entry.used < used:
                break
            room[tier] += 1
            count += 1
    devices = place(count, np.where(lasting, [tier.write_bytes_per_s for tier in pool.tiers], 0.0), room)
    return list(zip(volatile, devices.tolist()))


def restart(pool: MemoryPool, devices: DeviceClock, *, now_s: float, flush_s: float) -> Flushed:
    """A simulated pool closes and opens again: devices write what fits into flush_s seconds, and what does not outlive
    it is gone."""
    moves, volatile = blocks_to_move(pool), len(volatile_blocks(pool))
    entries = ((pool.index.get(key), key) for key in pool.index.keys())
    by_use = sorted(((entry.used, key) for entry, key in entries if entry is not None), key=itemgetter(0))
    kept, end = 0, now_s
    for key, tier in moves:
        if devices.write_end_s(tier, pool.block_bytes, now_s) > now_s + flush_s:
            break
        moved = pool.move(key, tier)
        if moved is not None:
            end = max(end, devices.write(tier, pool.block_bytes, now_s)[1])
            pool.stored(moved[1])
            kept += 1
    for at, one in enumerate(pool.tiers):
        if not one.is_lasting:
            pool.empty_tier(at)
    pool.touch([key for _, key in reversed(by_use)])  # disks note which of their blocks were used last
    devices.wait_until(end)
    return Flushed(kept, volatile - kept, now_s, end)


def check_restarts(restarts_s: Sequence[float]) -> list[float]:
    """In order of time. ValueError unless they are times."""
    if not np.isfinite(np.asarray(restarts_s, np.float64)).all():
        raise ValueError(f"restarts_s: expected seconds, got {restarts_s!r}")
    return sorted(float(at) for at in restarts_s)
