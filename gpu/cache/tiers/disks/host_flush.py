"""What a pool does before it closes, for the one that opens its directories next: disks write what host memory holds,
as pkvsim.memory.restarts says, and it is noted which of their blocks were used last.

The blocks are ordinary stores, behind those that wait already: they have headers, sums, and records of being complete,
and a process that is killed meanwhile leaves what had been written. When time is over, blocks that no disk has begun to
write are left out; those that it has are waited for as any, at most for its stall_s.
"""
from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress

import numpy as np

from gpu.cache.tiers.disks.disk_jobs import WriteJob
from gpu.cache.tiers.disks.disk_tier import DiskTier
from gpu.cache.tiers.disks.use_order import note_uses, order_of_use
from gpu.cache.tiers.host_arena import HostArena, view
from pkvsim.memory.blocks.block_sums import block_sums
from pkvsim.memory.memory_pool import MemoryPool, Write
from pkvsim.memory.restarts import Flushed, blocks_to_move, check_flush_s, volatile_blocks


class HostFlush:
    """Once. found: what came of writing, None where nothing was to be written."""

    def __init__(self, seconds: float) -> None:
        """seconds: that it may take; 0 for none. ValueError where it is no time."""
        self.found: Flushed | None = None
        self._seconds, self._has_run = check_flush_s(seconds), False
        self._changed = threading.Condition()
        self._pending = self._kept = 0
        self._block_bytes = 0
        self._writes: list[Write] = []
        self._sources: list[int] = []  # addresses, by the writes' places

    def run(
        self, pool: MemoryPool, lock: threading.Condition, arenas: Sequence[HostArena], disks: Sequence[DiskTier], *,
        behind: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        """No call of the cache is under way. lock: of the pool; behind: one thread whose tasks bring blocks into host
        memory. Where it was interrupted nothing more is written."""
        if self._has_run:
            return
        self._has_run = True
        begin, seconds = time.perf_counter(), min(self._seconds, threading.TIMEOUT_MAX)
        if seconds and arenas:
            with suppress(RuntimeError, NotYet):  # a process that ends takes no tasks, and has done those it took
                behind.submit(int).result(seconds)
        with lock:
            order = order_of_use(pool)
        try:
            if seconds and arenas and disks:
                self._write(pool, lock, arenas, disks, begin, seconds)
        finally:
            if order:  # nor where a pool could not be opened
                note_uses(pool, order, disks, first=len(arenas))

    def _write(
        self, pool: MemoryPool, lock: threading.Condition, arenas: Sequence[HostArena], disks: Sequence[DiskTier],
        begin: float, seconds: float,
    ) -> None:  # fmt: skip
        with lock:
            blocks = len(volatile_blocks(pool))
            jobs = self._jobs(pool, arenas, lock)
        self._pending = sum(map(len, jobs.values()))
        try:
            for tier, of_disk in jobs.items():
                disks[tier - len(arenas)].add(of_disk)
            left = max(0.0, begin + seconds - time.perf_counter())
            with self._changed:
                self._changed.wait_for(lambda: not self._pending, left)
        finally:
            for of_disk in jobs.values():
                for job in of_disk:
                    job.cancelled = True
        with self._changed:
            self.found = Flushed(self._kept, blocks - self._kept, begin, time.perf_counter())

    def _jobs(
        self, pool: MemoryPool, arenas: Sequence[HostArena], lock: threading.Condition
    ) -> dict[int, list[WriteJob]]:  # fmt: skip
        """By disks, each in the order in which blocks are worth it."""
        jobs: dict[int, list[WriteJob]] = {}
        self._block_bytes, ended = pool.block_bytes, self._ended_in(pool, lock)
        for key, tier in blocks_to_move(pool):
            moved = pool.move(key, tier)
            if moved is not None:
                (arena, slot), write = moved
                jobs.setdefault(tier, []).append(WriteJob(
                    write.place.slot, write.key, len(self._writes), self._fill, ended
                ))  # fmt: skip
                self._writes.append(write)
                self._sources.append(arenas[arena].address(slot))
        return jobs

    def _fill(self, buffers: np.ndarray, jobs: list[WriteJob]) -> np.ndarray:
        """As WriteJob has it, from host memory; in a disk's thread."""
        sums = []
        for buffer, job in zip(buffers.tolist(), jobs):
            ctypes.memmove(buffer, self._sources[job.tag], self._block_bytes)
            sums.append(block_sums(np.frombuffer(view(buffer, self._block_bytes), np.uint8)[None])[0])
        return np.array(sums)

    def _ended_in(self, pool: MemoryPool, lock: threading.Condition) -> Callable[[list[WriteJob], str | None], None]:
        def ended(jobs: list[WriteJob], fault: str | None) -> None:
            with lock:
                for job in jobs:
                    pool.stored(self._writes[job.tag], ok=fault is None)
            with self._changed:
                self._pending -= len(jobs)
                self._kept += len(jobs) * (fault is None)
                self._changed.notify_all()

        return ended
