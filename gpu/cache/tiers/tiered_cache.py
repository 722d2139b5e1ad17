"""KV blocks kept beyond the GPU's pages: stored to host memory and disks, loaded from all of them at once.

    cache = TieredKVCache(device, host=[HostStore(...)], disks=[DiskStore(...)])
    handle = cache.store(keys, pages)             a prompt's whole blocks, from its start, and the pages they are in
    hits = cache.lookup(keys)                     how many leading blocks it could load
    handle = cache.load(keys, pages)              into pages that the caller has allocated
    handle.wait_layer(l)                          the caller's stream may attend to layer l of that many blocks

What goes where, and what goes when there is no room, pkvsim.memory decides, as it does for the simulator. A key covers
everything before its block and how it was computed (model, type, layout): equal keys are equal KV. Whatever a tier does
wrong costs hits: a block is used only where its key and sums are right, and every wait ends.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from gpu.cache.tiers.block_arguments import check_keys, check_pages
from gpu.cache.tiers.cache_calls import CacheCalls
from gpu.cache.tiers.device import Device, Ticket, has_ended, wait_ended
from gpu.cache.tiers.disks.disk_jobs import Porter, WriteJob
from gpu.cache.tiers.disks.disk_stats import disk_stats
from gpu.cache.tiers.disks.disk_tier import DiskTier
from gpu.cache.tiers.disks.host_flush import HostFlush
from gpu.cache.tiers.disks.use_order import restore_blocks
from gpu.cache.tiers.handles import LoadHandle, StoreHandle
from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.load_parts import give, is_long, split_load
from gpu.cache.tiers.open_disk import open_disk
from gpu.cache.tiers.stores import DiskStore, HostStore, check_stores
from pkvsim.memory.load_or_recompute import choose_prefix, in_layers, load_times_s
from pkvsim.memory.memory_pool import MemoryPool, Read, Write

MOST_FAULTS = 64  # of one disk, after which it is not used any more


class TieredKVCache:
    """Host memory and disks behind a device's pages, for the threads of the process that opens it. A process forked
    from that has none of its threads: every call there raises ValueError, and close() leaves all to the other."""

    def __init__(
        self, device: Device, *, host: Sequence[HostStore] = (), disks: Sequence[DiskStore] = (), contents: str = "",
        link_bytes_per_s: float = float("inf"), flush_s: float = 0.0, **pool_options: Any,
    ) -> None:  # fmt: skip
        """contents: what a block is (model, type, layout), noted in the disks' directories; link_bytes_per_s: of
        load-or-recompute; flush_s: most seconds of close() in which disks write what host memory holds, used last
        first (pkvsim.memory.restarts), so that a restart loads it; pool_options: placement, retention, admission and
        drift of MemoryPool. Takes in what the disks kept. Raises ValueError naming the argument, and has opened nothing
        then."""
        check_stores(host, disks, device.block_bytes)
        if not link_bytes_per_s > 0:
            raise ValueError(f"link_bytes_per_s: expected > 0, got {link_bytes_per_s!r}")
        self.device, self.flush = device, HostFlush(flush_s)
        self._pool = MemoryPool([one.tier for one in (*host, *disks)], block_bytes=device.block_bytes, **pool_options)
        self._lock = threading.Condition()
        self._link = link_bytes_per_s
        self._arenas: list[HostArena] = []
        self._disks: list[DiskTier] = []
        self._lost: set[int] = set()
        self._calls = CacheCalls(self._lock)
        self._closing = threading.Lock()
        self._is_done = False
        self._device_faults, self._last_device_fault = 0, ""
        self._porter = Porter()
        self._loader = ThreadPoolExecutor(1, "tier loads")  # asks for copies of long loads, and beside disks
        self._waiter = ThreadPoolExecutor(1, "tier copies")  # waits for copies of host memory and tells the pool
        try:
            for store in host:
                self._arenas.append(HostArena(
                    slots=store.tier.slots(device.block_bytes), slot_bytes=device.block_bytes, node=store.node,
                    pin=store.pin,
                ))  # fmt: skip
            for at, directory in enumerate(disks, len(self._arenas)):
                disk = open_disk(
                    directory, self._porter, block_bytes=device.block_bytes, contents=contents,
                    observe=partial(self._observe, at), stalled=partial(self._lose, at),
                )  # fmt: skip
                self._disks.append(disk)
            restore_blocks(self._pool, self._disks, first=len(self._arenas))
        except BaseException:
            self.close()
            raise

    def lookup(self, keys: Sequence[bytes], compute_s: Callable[[np.ndarray], np.ndarray] | None = None) -> int:
        """How many leading blocks load() would load: all that are there or, with compute_s (seconds to compute the rest
        of the prompt after n loaded blocks [k] -> [k]), as many as give the first token soonest."""
        check_keys(keys)
        with self._calls.lock:
            hits = self._pool.ready_prefix(keys)
            if compute_s is None or not hits:
                return hits
            places = self._pool.places(keys[:hits])
            rates = np.where(self._pool.shares.weights > 0, self._pool.shares.weights, np.inf)
        queued = [0] * len(self._arenas) + [disk.queued for disk in self._disks]
        block_bytes = self.device.block_bytes
        backlog = np.array(queued) * block_bytes / rates
        times = load_times_s(places, block_bytes, rates, backlog_s=backlog, link_bytes_per_s=self._link)
        steps = self.device.load_steps if in_layers(self._pool.tiers, places) else 1
        return choose_prefix(times, compute_s, num_layers=steps).blocks

    def load(self, keys: Sequence[bytes], pages: Sequence[int] | np.ndarray) -> LoadHandle:
        """Begins to load the leading blocks of keys into pages, at most as many as there are pages.

        Pages may be in use by what the caller's stream was given before. Raises ValueError naming the argument.
        """
        with self._calls.one():
            check_keys(keys, once=True)
            return self._load(keys, check_pages(pages, self.device.num_pages, once=True))

    def _load(self, keys: Sequence[bytes], pages: np.ndarray) -> LoadHandle:
        mark = self.device.mark()  # before anything is taken, as it may raise
        with self._lock:
            reads = self._pool.want(list(keys), limit=len(pages))
        handle = LoadHandle(self, reads, pages, mark)
        host, jobs = split_load(handle, reads, self._arenas, len(self._disks))
        handle._owe([job for group in jobs for job in group])
        # Disks first, as they are the slower ones; and all together, with little of Python behind it in this thread:
        # a disk's thread that wakes while it runs waits for Python's lock, 5 ms and more where others wait too.
        for disk, group in zip(self._disks, jobs):
            if group:
                disk.add(group)
        if not len(host.blocks):
            handle._asked(handle.blocks)
        elif any(jobs) or is_long(len(host.blocks), self.device.block_bytes):
            # The caller waits for disks in any case, and they have their part of the link at once.
            give(self._loader, handle._copy_host, host.addresses, host.blocks, aside=True)
        else:
            handle._copy_host(host.addresses, host.blocks, aside=False)
        return handle

    def store(self, keys: Sequence[bytes], pages: Sequence[int] | np.ndarray) -> StoreHandle:
        """Begins to store the blocks of a prompt, whole ones from its start, that the pool has not, up to the first
        for which it has no room. pages [len(keys)] must keep their KV until handle.wait_copied(). Raises ValueError."""
        with self._calls.one():
            check_keys(keys, once=True)
            pages = check_pages(pages, self.device.num_pages)
            if len(pages) != len(keys):
                raise ValueError(f"pages: expected one for each of {len(keys)} keys, got {len(pages)}")
            return self._store(keys, pages)

    def _store(self, keys: Sequence[bytes], pages: np.ndarray) -> StoreHandle:
        mark = self.device.mark()  # before anything is taken, as it may raise
        with self._lock:
            writes = self._pool.store(keys)
        handle = StoreHandle(self, writes, keys, pages, mark)
        host = [write for write in writes if write.place.tier < len(self._arenas)]
        for tier, disk in enumerate(self._disks, len(self._arenas)):
            jobs = [
                WriteJob(write.place.slot, write.key, at, handle._fill, handle._disk_ended)
                for at, write in enumerate(writes) if write.place.tier == tier
            ]  # fmt: skip
            if jobs:
                disk.add(jobs)
        if host:
            addresses = np.array([self._arenas[write.place.tier].address(write.place.slot) for write in host])
            try:
                ticket = handle._copy(host, addresses)
            except Exception as error:  # of the GPU: nothing of it is under way, and disks have their blocks
                self._end_host(handle, host, f"{type(error).__name__}: {error}")
            else:
                give(self._waiter, self._host_stored, handle, host, ticket)
        return handle

    def free(self, keys: Sequence[bytes]) -> None:
        """Forgets blocks that will not be asked for again, where nobody reads or writes them."""
        with self._calls.lock:
            self._pool.forget(list(dict.fromkeys(keys)))

    def hold(self, keys: Sequence[bytes], until_s: float) -> int:
        """Keeps a session's blocks until expire() is told that time; see pkvsim.memory.retention.choose_ttl_s."""
        with self._calls.lock:
            return self._pool.hold(keys, until_s)

    def expire(self, now_s: float) -> None:
        """Ends the holds whose time is over."""
        with self._calls.lock:
            self._pool.expire(now_s)

    def tiers_of(self, keys: Sequence[bytes]) -> list[int]:
        """Which tier each of these blocks lies on, host memory before disks. KeyError where one is nowhere."""
        with self._calls.lock:
            return self._pool.places(keys)

    def stats(self) -> dict[str, Any]:
        """What it has done so far, by tier."""
        with self._calls.lock:
            out: dict[str, Any] = {"blocks": len(self._pool), **asdict(self._pool.counts)}
            out["device_faults"], out["last_device_fault"] = self._device_faults, self._last_device_fault
            out["quarantined"], out["replans"] = self._pool.index.quarantined, self._pool.shares.replans
            weights = self._pool.shares.weights
        for tier, disk in enumerate(self._disks, len(self._arenas)):
            out[self._pool.tiers[tier].name] = disk_stats(disk, float(weights[tier]))
        return out

    def close(self) -> None:
        """Finishes what is under way, writes what flush_s has time for, closes the files and gives host memory back.
        Waits for calls of other threads; may be called again, also where it was interrupted."""
        if not self._calls.are_own:
            return
        self._calls.end()
        with self._closing:
            if self._is_done:
                return
            self.flush.run(self._pool, self._lock, self._arenas, self._disks, behind=self._waiter)
            for disk in self._disks:
                disk.close()
            self._porter.close()
            self._loader.shutdown()
            self._waiter.shutdown()
            for arena in (*self._arenas, *(disk.ring for disk in self._disks)):
                arena.close()
            self._is_done = True

    def __enter__(self) -> TieredKVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Called by handles, and by the threads of disks and copies.

    def _check_own(self) -> None:
        self._calls.check_own()

    def _after_copies(self, handle: LoadHandle) -> None:
        """All blocks of a load have been handed over: once they are copied, the pool may move them again."""
        tickets = handle._layers  # those of disks have ended before their jobs do
        if all(map(has_ended, tickets)) or self._calls.is_closed:
            self._loaded(handle, tickets)
        else:
            give(self._waiter, self._loaded, handle, tickets)

    def _loaded(self, handle: LoadHandle, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            wait_ended(ticket)
        handle.ended_s = time.perf_counter()
        with self._lock:
            self._pool.done_all(handle._reads)

    def _host_stored(self, handle: StoreHandle, writes: Sequence[Write], ticket: Ticket) -> None:
        self._end_host(handle, writes, wait_ended(ticket))

    def _end_host(self, handle: StoreHandle, writes: Sequence[Write], fault: str | None) -> None:
        """Blocks of a store lie in host memory, or could not be copied there."""
        if fault is not None:
            self._device_failed(fault)
        handle._copied(len(writes))
        handle._ended(writes, fault is None)

    def _device_failed(self, fault: str) -> None:
        with self._lock:
            self._device_faults += 1
            self._last_device_fault = fault

    def _stored(self, writes: Sequence[Write], ok: bool) -> None:
        with self._lock:
            self._pool.stored_all(writes, ok=ok)

    def _touch(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._pool.touch(keys)

    def _failed(self, read: Read) -> None:
        with self._lock:
            self._pool.failed(read.key, read.place)
        self._count_fault(read.place.tier)

    def _count_fault(self, tier: int) -> None:
        if self._disks[tier - len(self._arenas)].counts.faults >= MOST_FAULTS:
            self._lose(tier)

    def _lose(self, tier: int) -> None:
        with self._lock:
            if tier not in self._lost:
                self._lost.add(tier)
                self._pool.lose_tier(tier)

    def _observe(self, tier: int, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._pool.shares.observe(tier, num_bytes, seconds)
