"""How fast each place of KV beyond the GPU is: the link both ways, arenas of host memory, disks behind directories.

Disks are measured through TieredKVCache, as the pool will use them; host memory in runs of a page
of K or V, as it is gathered; the link in one piece.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gpu.cache.tiers.device import Device, NoPages
from gpu.cache.tiers.disks.disk_files import HEADER_BYTES
from gpu.cache.tiers.host_arena import HostArena, round_up
from gpu.cache.tiers.stores import DiskStore
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.tiers import DISK, HOST, Tier

MIB = 2**20
BLOCK_BYTES = 2 * MIB  # 16 tokens of 32 layers of 8 KV heads of 128 elements of FP16
RUN_BYTES = 64 * 2**10  # of such a block, a layer's page of K and that of V
UNDER_WAY_BYTES = 64 * MIB
CAPACITY_SHARE = 0.5  # of what is free where a tier is measured; a user may name another capacity
LATENCY_READS = 9


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second, and seconds from asking an idle device for a block to the block, its bytes' time taken off."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    read_latency_s: float = 0.0


def median_s(body: Callable[[], None], repeats: int = 5) -> float:
    """Median wall time of body(), which ends when its work does; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        body()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def link_rates(num_bytes: int) -> dict[str, float]:
    """One cudaMemcpyAsync of one piece from and to pinned memory, alone and both at once: in_gb_s, out_gb_s and
    both_gb_s, each way's."""
    import cupy

    arena = HostArena(slots=2, slot_bytes=num_bytes, pin=True)
    device = cupy.zeros((2, num_bytes), cupy.uint8)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]

    def copy(way: int) -> None:
        pointers = (device[way].data.ptr, arena.address(way))
        cupy.cuda.runtime.memcpyAsync(*(pointers if way == 0 else pointers[::-1]), num_bytes,
                                      cupy.cuda.runtime.memcpyDefault, streams[way].ptr)  # fmt: skip

    def run(ways: tuple[int, ...]) -> float:
        def body() -> None:
            for way in ways:
                copy(way)
            for way in ways:
                streams[way].synchronize()

        return num_bytes / median_s(body) / 1e9

    found = {"in_gb_s": run((0,)), "out_gb_s": run((1,)), "both_gb_s": run((0, 1))}
    arena.close()
    return found


def host_rates(device: Device, num_bytes: int, *, node: int | None, pin: bool) -> Rates:
    """An arena of host memory on a NUMA node, scattered blocks to the device's pages and back."""
    blocks = max(1, min(num_bytes // device.block_bytes, device.num_pages))
    arena = HostArena(slots=blocks, slot_bytes=device.block_bytes, node=node, pin=pin)
    rng = np.random.default_rng(0)
    addresses = arena.addresses(rng.permutation(blocks))
    pages = rng.permutation(device.num_pages)[:blocks].astype(np.int32)
    try:
        out_s = median_s(lambda: device.copy_out(pages, addresses, after=device.mark()).wait())
        in_s = median_s(lambda: device.copy_in(addresses, pages, after=device.mark(), each_layer=True)[-1].wait())
    finally:
        arena.close()
    return Rates(blocks * device.block_bytes / in_s, blocks * device.block_bytes / out_s)


def disk_rates(directory: Path, device: Device, num_bytes: int, *, pin: bool) -> tuple[Rates, str]:
    """(rates, what reads) of the disk behind a directory, random blocks of the device, LATENCY_READS + 1 at least.
    ValueError where it cannot hold them, or the device has too few pages, RuntimeError where a block did not come
    back."""
    slot_bytes = HEADER_BYTES + round_up(device.block_bytes)
    count = max(LATENCY_READS + 1, num_bytes // device.block_bytes)
    depth = max(8, UNDER_WAY_BYTES // slot_bytes)
    room = os.statvfs(directory)
    if count * slot_bytes > room.f_bavail * room.f_frsize:
        raise ValueError(f"directory: expected room for {count * slot_bytes:,} bytes, {directory} has less")
    place = Path(tempfile.mkdtemp(dir=directory, prefix="pkv-measure-"))
    tier = Tier(name="disk", kind=DISK, capacity_bytes=count * device.block_bytes, read_bytes_per_s=1e9,
                write_bytes_per_s=1e9)  # fmt: skip
    store = DiskStore(tier=tier, directory=str(place), bytes_under_way=depth * slot_bytes,
                      ring_bytes=3 * depth * slot_bytes, pin=pin)  # fmt: skip
    keys = [hashlib.sha256(f"block {at}".encode()).digest() for at in range(count)]
    pages = np.arange(count, dtype=np.int32)
    try:
        with TieredKVCache(device, disks=[store]) as cache:
            begin = time.perf_counter()
            handle = cache.store(keys, pages)
            handle.wait()
            write_s = time.perf_counter() - begin
            _check(handle.blocks, count, cache)
            order = np.random.default_rng(0).permutation(count)
            shuffled = [keys[at] for at in order]

            def load(some: Sequence[bytes]) -> None:
                _check(cache.load(some, pages[: len(some)]).wait(), len(some), cache)

            read_s = median_s(lambda: load(shuffled), repeats=2)
            single_s = statistics.median(
                median_s(partial(load, [shuffled[at]]), repeats=1) for at in range(LATENCY_READS)
            )  # fmt: skip
            stats = cache.stats()["disk"]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    rate = count * device.block_bytes / read_s
    how = f"{stats['reader']}, {'O_DIRECT' if stats['direct'] else 'buffered'}"
    latency_s = max(0.0, single_s - device.block_bytes / rate)
    return Rates(rate, count * device.block_bytes / write_s, latency_s), how


def _check(found: int, wanted: int, cache: TieredKVCache) -> None:
    if found < wanted:
        raise RuntimeError(f"{found} of {wanted} blocks: {cache.stats()}")


def host_tier(name: str, rates: Rates, free_bytes: int, source: str) -> Tier:
    """A measured tier of host memory."""
    return _tier(name, HOST, rates, free_bytes, source)


def disk_tier(name: str, rates: Rates, directory: Path, source: str) -> Tier:
    """A measured tier of a directory."""
    room = os.statvfs(directory)
    return _tier(name, DISK, rates, room.f_bavail * room.f_frsize, source)


def _tier(name: str, kind: str, rates: Rates, free_bytes: int, source: str) -> Tier:
    return Tier(
        name=name, kind=kind, capacity_bytes=int(free_bytes * CAPACITY_SHARE),
        read_bytes_per_s=rates.read_bytes_per_s, write_bytes_per_s=rates.write_bytes_per_s,
        read_latency_s=rates.read_latency_s, assumed=False, source=source,
    )  # fmt: skip


def make_device(num_pages: int, *, cuda: bool) -> Device:
    """Pages of BLOCK_BYTES a block on the GPU, or pages that keep nothing."""
    layers = BLOCK_BYTES // (2 * (RUN_BYTES // 2))
    if not cuda:
        return NoPages(BLOCK_BYTES, num_pages, layers)
    import cupy

    from gpu.cache.tiers.transfer import CudaPages

    k, v = ([cupy.zeros((num_pages, RUN_BYTES // 2), cupy.uint8) for _ in range(layers)] for _ in range(2))
    return CudaPages(k, v)
