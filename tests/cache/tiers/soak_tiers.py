"""Requests over host memory and two disks under random faults, several at a time; nothing may leak, no block be wrong.

    python tests/cache/tiers/soak_tiers.py --requests 20000

A request takes pages, loads what there is of its prompt, computes the rest and stores it; some are cancelled while they
load, some forgotten, some held. Reads and writes fail with EIO, ENOSPC, short counts and flipped bits, and now and then
a disk stalls and is given up. Every so often the cache is closed, its files are damaged, and it is opened again. Every
block that a load calls valid, and every block when its request ends, must be what computing it gives. At each restart
all pages, slots, threads and file handles must be back, and memory no more than early on.
"""
from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pool_cases import EIO, ENOSPC, FaultyReader, check, compute, device, disk, host, keys

from gpu.cache.tiers.handles import LoadHandle
from gpu.cache.tiers.tiered_cache import TieredKVCache

PAGES, UNDER_WAY = 64, 4
MOST_BLOCKS = 12
FAULT_PART = 60  # one request of a disk in so many fails
SLACK_BYTES = 48 << 20  # what allocators and page caches may keep; a leak of 4 KiB a request is more


@dataclass(slots=True)
class Soak:
    """What a run counted, and what it watches."""

    requests: int = 0
    hits: int = 0
    asked: int = 0
    faults: int = 0
    cancelled: int = 0
    stalls: int = 0
    restarts: int = 0
    resident: list[int] = field(default_factory=list)  # bytes at each restart


@dataclass(slots=True)
class Request:
    """One that is under way."""

    prompt: list[bytes]
    pages: np.ndarray
    load: LoadHandle


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_rule(rng: np.random.Generator, stalls: Callable[[], bool]) -> Callable:
    """Spoils requests of a disk at random; stalls() says whether this one never answers."""
    kinds = [EIO, ENOSPC, 100, "flip"]
    lock = threading.Lock()

    def rule(request, count):
        with lock:
            if rng.integers(FAULT_PART) == 0:
                return kinds[int(rng.integers(len(kinds)))]
            return "stall" if stalls() else None

    return rule


def damage(path: Path, rng: np.random.Generator) -> None:
    """Flips, cuts or removes some of a directory's files while nobody uses it."""
    what = int(rng.integers(4))
    name = ("blocks", "complete")[int(rng.integers(2))]
    if what == 0 or not (path / name).exists():
        return
    if what == 1:
        (path / name).unlink()
        return
    with open(path / name, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if what == 2 and size:
            file.truncate(int(rng.integers(size)))
        for _ in range(5 if what == 3 and size else 0):
            file.seek(int(rng.integers(size)))
            file.write(bytes([int(rng.integers(256))]))


def soak(folder: Path, requests: int, *, seed: int = 0, restart_every: int = 400) -> Soak:
    """Serves that many requests; AssertionError where something is wrong or left behind."""
    rng = np.random.default_rng(seed)
    found = Soak()
    readers: list[FaultyReader] = []
    gc.collect()  # what others in this process have left to it
    handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    while found.requests < requests:
        pages = device(PAGES)
        stalling = found.restarts % 3 == 2
        left = [200 + int(rng.integers(400)) if stalling else -1]

        def stalls() -> bool:
            left[0] -= 1
            return left[0] == 0

        def reader(depth: int, buffers: object) -> FaultyReader:
            readers.append(FaultyReader(make_rule(np.random.default_rng(rng.integers(2**31)), stalls), depth))
            return readers[-1]

        disks = [disk(folder / name, 40, reader=reader, stall_s=0.2) for name in "ab"]
        flush_s = (0.0, 5.0, 0.01)[found.restarts % 3]
        with TieredKVCache(pages, host=[host(8)], disks=disks, flush_s=flush_s) as cache:
            serve(cache, pages, rng, found, min(restart_every, requests - found.requests))
            wait_for(lambda: not any(one.queued for one in cache._disks), "reads and writes of disks")
            stats = cache.stats()
            found.faults += sum(stats[name]["faults"] for name in "ab")
            stalled = [stats[name]["stalled"] for name in "ab"]
            found.stalls += sum(stalled)
            for one in readers:
                one.release()  # a device that stalled answers at last, to buffers that are still its own
        with cache._lock:
            cache._pool.check()
        if not any(stalled):
            assert cache.stats()["quarantined"] == 0
        readers.clear()
        for name in "ab":
            damage(folder / name, rng)
        del cache, disks
        gc.collect()
        found.restarts += 1
        found.resident.append(resident_bytes())
        wait_for(lambda: threading.active_count() <= threads, "threads")
        assert len(os.listdir("/proc/self/fd")) == handles, "file handles are left open"
    early = max(found.resident[: max(3, len(found.resident) // 4)])
    assert found.resident[-1] < early + SLACK_BYTES, f"{(found.resident[-1] - early) >> 20} MiB more than early on"
    return found


def serve(cache: TieredKVCache, pages, rng: np.random.Generator, found: Soak, requests: int) -> None:
    """Requests, UNDER_WAY of them at a time."""
    free = list(range(PAGES))
    under_way: deque[Request] = deque()
    for at in range(requests):
        count = int(rng.integers(1, MOST_BLOCKS + 1))
        prompt = keys(str(min(int(rng.zipf(1.5)), 60)), count)
        mine = np.array([free.pop() for _ in range(count)], np.int32)
        pages.pages[mine] = 0xEE
        under_way.append(Request(prompt, mine, cache.load(prompt, mine)))
        if len(under_way) == UNDER_WAY:
            free += finish(cache, pages, under_way.popleft(), rng, found).tolist()
        if at % 50 == 7:
            cache.free(prompt)
        if at % 20 == 3:
            cache.hold(prompt, until_s=float(at + 30))
        cache.expire(float(at))
    while under_way:
        free += finish(cache, pages, under_way.popleft(), rng, found).tolist()
    cache.expire(float("inf"))
    assert sorted(free) == list(range(PAGES)), "pages are lost"


def finish(cache: TieredKVCache, pages, one: Request, rng: np.random.Generator, found: Soak) -> np.ndarray:
    """Waits for a request's load, computes what is missing, checks all of it and stores it; its pages."""
    valid = 0
    if rng.integers(17) == 0:
        one.load.cancel()
        found.cancelled += 1
    else:
        valid = one.load.wait_layer(int(rng.integers(pages.num_layers)))
        assert valid == one.load.wait()
    check(pages, one.prompt[:valid], one.pages[:valid])
    compute(pages, one.prompt[valid:], one.pages[valid:])
    store = cache.store(one.prompt, one.pages)
    store.wait_copied()
    check(pages, one.prompt, one.pages)
    found.requests += 1
    found.hits += valid
    found.asked += len(one.prompt)
    return one.pages


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 5.0) -> None:
    """AssertionError where it does not come true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} are left"
        time.sleep(0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="soak-") as folder:
        found = soak(Path(folder), args.requests, seed=args.seed)
    print(f"{found.requests:,} requests, {found.hits:,} of {found.asked:,} blocks loaded and right, {found.faults:,} faults, "
          f"{found.cancelled:,} cancelled, {found.stalls} stalls, {found.restarts} restarts, "
          f"{found.resident[0] >> 20} to {found.resident[-1] >> 20} MiB, {time.perf_counter() - begin:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
