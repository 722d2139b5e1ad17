"""Disks of the pool against a plain C loop over the same file, and unlike tiers against the sum of their rates."""
from __future__ import annotations

import hashlib
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu.cache.tiers.device import Device, NoPages
from gpu.cache.tiers.disks.disk_files import HEADER_BYTES
from gpu.cache.tiers.disks.disk_reads import LimitedReader, Reader
from gpu.cache.tiers.disks.open_reader import open_reader
from gpu.cache.tiers.handles import LoadHandle
from gpu.cache.tiers.host_arena import ALIGNMENT
from gpu.cache.tiers.stores import DiskStore, HostStore
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.load_or_recompute import load_times_s
from pkvsim.memory.tiers import DISK, HOST, Tier

ROOF_SOURCE = Path(__file__).with_name("roof.c")
DEPTH_BYTES = 64 * 2**20  # under way at a disk, in the pool and in the C loop
MIN_DEPTH, MAX_DEPTH = 8, 128
MIN_BLOCKS = 64  # of a disk that is measured
RING_DEPTHS = 3  # a ring's buffers, in depths: what has arrived waits for the GPU


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """One disk, random blocks of block_bytes; the pool and the C loop in turns. Cores per GB/s: of all threads and the
    kernel, and of the disk's thread."""

    block_bytes: int
    roof_gb_s: float | None  # None without a C compiler
    pool_gb_s: float
    share: float | None  # the median of turns, each of the mean of the C loop's before and after it
    roofs_gb_s: tuple[float, ...]  # of turns, one more than the pool's
    pools_gb_s: tuple[float, ...]
    cores_per_gb_s: float
    thread_cores_per_gb_s: float
    roof_cores_per_gb_s: float | None
    reader: str
    direct: bool


def keys_of(name: str, count: int) -> list[bytes]:
    """Distinct keys of blocks."""
    return [hashlib.sha256(f"{name} {at}".encode()).digest() for at in range(count)]


def cpu_s() -> float:
    """Processor seconds of this process so far, all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def build_roof(folder: Path) -> Path | None:
    """The C loop, compiled; None without a compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    program = folder / "roof"
    subprocess.run([compiler, "-O2", "-pthread", ROOF_SOURCE, "-o", program], check=True)
    return program


def store_all(cache: TieredKVCache, keys: list[bytes], group: int = 256) -> None:
    """Stores blocks, whatever lies in the first pages, some at a time."""
    for begin in range(0, len(keys), group):
        part = keys[begin : begin + group]
        handle = cache.store(part, np.arange(len(part)))
        handle.wait()
        if handle.blocks < len(part):
            raise RuntimeError(f"stored {handle.blocks} of {len(part)} blocks: {cache.stats()}")


def timed_load(cache: TieredKVCache, keys: Sequence[bytes]) -> tuple[float, LoadHandle]:
    """(seconds until all of them are in the device's pages, the handle); RuntimeError where one is not."""
    pages = np.arange(len(keys), dtype=np.int32)
    begin = time.perf_counter()
    handle = cache.load(keys, pages)
    valid = handle.wait()
    seconds = time.perf_counter() - begin
    if valid < len(keys):
        raise RuntimeError(f"loaded {valid} of {len(keys)} blocks: {cache.stats()}")
    return seconds, handle


def depth_of(slot_bytes: int, depth_bytes: int = DEPTH_BYTES) -> int:
    """Requests under way."""
    return min(MAX_DEPTH, max(MIN_DEPTH, depth_bytes // slot_bytes))


def one_disk(
    directory: Path, device: Device, *, total_bytes: int, repeats: int = 7, reader: str = "auto"
) -> DiskFigures:  # fmt: skip
    """Random blocks of a directory's disk through the pool, in turn with the C loop over the same file."""
    count = max(MIN_BLOCKS, total_bytes // device.block_bytes)
    place = Path(tempfile.mkdtemp(dir=directory, prefix="pool-"))
    slot_bytes = HEADER_BYTES + -(-device.block_bytes // ALIGNMENT) * ALIGNMENT
    depth = depth_of(slot_bytes)
    tier = Tier(name="disk", kind=DISK, capacity_bytes=count * device.block_bytes, read_bytes_per_s=1e9,
                write_bytes_per_s=1e9)  # fmt: skip
    store = DiskStore(tier=tier, directory=str(place / "tier"), bytes_under_way=depth * slot_bytes, reader=reader,
                      ring_bytes=RING_DEPTHS * depth * slot_bytes, pin=not isinstance(device, NoPages))  # fmt: skip
    try:
        program = build_roof(place)
        with TieredKVCache(device, disks=[store]) as cache:
            keys = keys_of("disk", count)
            store_all(cache, keys)
            rng = np.random.default_rng(0)
            roofs, pools, cores, threads, roof_cores = [], [], [], [], []
            for turn in range(repeats + 1):
                if program is not None:
                    words = [program, place / "tier" / "blocks", slot_bytes, count, depth, count, turn]
                    told = subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout.split()
                    roofs.append(int(told[0]) / float(told[1]) / 1e9)
                    roof_cores.append(float(told[2]) / (int(told[0]) / 1e9))
                if turn == repeats:
                    break
                shuffled = [keys[at] for at in rng.permutation(count)]
                before, before_thread = cpu_s(), cache.stats()["disk"]["thread_s"]
                seconds, _ = timed_load(cache, shuffled)
                gb = count * device.block_bytes / 1e9
                pools.append(gb / seconds)
                cores.append((cpu_s() - before) / gb)
                threads.append((cache.stats()["disk"]["thread_s"] - before_thread) / gb)
            stats = cache.stats()["disk"]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    # A virtual disk's rate changes within seconds, so a turn is held against those beside it.
    shares = [2 * pool / (before + after) for pool, before, after in zip(pools, roofs, roofs[1:])]
    return DiskFigures(
        device.block_bytes, statistics.median(roofs) if roofs else None, statistics.median(pools),
        statistics.median(shares) if shares else None, tuple(roofs), tuple(pools),
        statistics.median(cores), statistics.median(threads), statistics.median(roof_cores) if roof_cores else None,
        stats["reader"], stats["direct"],
    )  # fmt: skip


def limited(name: str, bytes_per_s: float, limiters: dict[str, LimitedReader]):
    """Makes a reader of DiskStore that is no faster than that, and notes it by the disk's name."""

    def make(depth: int, buffers: Sequence[tuple[int, int]]) -> Reader:
        limiters[name] = LimitedReader(open_reader(depth=depth, buffers=buffers), bytes_per_s)
        return limiters[name]

    return make


def limited_disk(
    name: str, directory: Path, bytes_per_s: float, blocks: int, block_bytes: int, *, pin: bool,
    limiters: dict[str, LimitedReader] | None = None, depth_bytes: int = DEPTH_BYTES, ring_depths: int = RING_DEPTHS,
) -> DiskStore:  # fmt: skip
    """A disk tier on a directory, limited to a rate. limiters: takes its limiter, once it is open."""
    tier = Tier(name=name, kind=DISK, capacity_bytes=blocks * block_bytes, read_bytes_per_s=bytes_per_s,
                write_bytes_per_s=bytes_per_s, assumed=False, source="a limiter")  # fmt: skip
    under_way = depth_of(HEADER_BYTES + block_bytes, depth_bytes) * (HEADER_BYTES + block_bytes)
    reader = limited(name, bytes_per_s, {} if limiters is None else limiters)
    return DiskStore(tier=tier, directory=str(directory / name), reader=reader, pin=pin, bytes_under_way=under_way,
                     ring_bytes=ring_depths * under_way)  # fmt: skip


def three_tiers(
    directories: Sequence[Path], rates: Sequence[float], device: Device, *, blocks: int, placement: str
) -> dict[str, float]:  # fmt: skip
    """Three unlike disk tiers read at once: {gb_s, sum_gb_s, share, predicted_error_percent}, limiters labelled so."""
    pin = not isinstance(device, NoPages)
    places = [Path(tempfile.mkdtemp(dir=directory, prefix="pool-")) for directory in directories]
    try:
        stores = [limited_disk(f"disk{at}", place, rate, blocks, device.block_bytes, pin=pin)
                  for at, (place, rate) in enumerate(zip(places, rates))]  # fmt: skip
        with TieredKVCache(device, disks=stores, placement=placement, drift=1e9) as cache:
            keys = keys_of("three", blocks)
            store_all(cache, keys, group=blocks)
            errors = []
            for part in (blocks // 4, blocks // 2, blocks):
                seconds, _ = timed_load(cache, keys[:part])
                wanted = load_times_s(cache.tiers_of(keys[:part]), device.block_bytes, np.array(rates))[-1]
                errors.append(abs(wanted / seconds - 1) * 100)
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
    rate = blocks * device.block_bytes / seconds
    return {"gb_s": rate / 1e9, "sum_gb_s": sum(rates) / 1e9, "share": rate / sum(rates),
            "predicted_error_percent": statistics.mean(errors)}  # fmt: skip


def host_store(blocks: int, block_bytes: int, bytes_per_s: float, *, pin: bool) -> HostStore:
    """A tier of host memory for that many blocks."""
    return HostStore(tier=Tier(name="host", kind=HOST, capacity_bytes=blocks * block_bytes,
                               read_bytes_per_s=bytes_per_s, write_bytes_per_s=bytes_per_s), pin=pin)  # fmt: skip
