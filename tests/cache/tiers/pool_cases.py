"""Pools of host pages, directories and injected faults for the tests of gpu.cache.tiers."""
from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.disks.disk_reads import Done, Request, ThreadReader
from gpu.cache.tiers.stores import DiskStore, HostStore
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.tiers import Tier

LAYERS, RUN_BYTES = 3, 4096
BLOCK_BYTES = LAYERS * RUN_BYTES
SLOT = 4096 + BLOCK_BYTES  # of a disk's file, with the block's header
LONG_S = 20.0  # after which something counts as never ending


def tier(name: str, blocks: int, *, kind: str = "disk", rate: float = 1e9) -> Tier:
    return Tier(name=name, kind=kind, capacity_bytes=blocks * BLOCK_BYTES, read_bytes_per_s=rate, write_bytes_per_s=rate)


def device(num_pages: int = 64) -> HostPages:
    return HostPages(num_pages=num_pages, num_layers=LAYERS, run_bytes=RUN_BYTES)


def disk(path: Path, blocks: int = 32, **options) -> DiskStore:
    options = {"stall_s": 5.0, "ring_bytes": 2**17, "bytes_under_way": 2**16, "reader": "preadv"} | options
    rate = options.pop("rate", 1e9)
    return DiskStore(tier=tier(path.name, blocks, rate=rate), directory=str(path), pin=False, **options)


def host(blocks: int = 32, rate: float = 1e9, name: str = "host") -> HostStore:
    return HostStore(tier=tier(name, blocks, kind="host", rate=rate), pin=False)


def keys(prompt: str, count: int) -> list[bytes]:
    """Chained keys of a prompt's blocks."""
    out, last = [], prompt.encode()
    for _ in range(count):
        last = hashlib.sha256(last).digest()
        out.append(last)
    return out


def content(key: bytes) -> np.ndarray:
    """The KV that a block of this key has, whoever computes it: uint8 [LAYERS, RUN_BYTES]."""
    seed = np.frombuffer(key, np.uint32)
    return np.random.Generator(np.random.SFC64(seed)).integers(0, 256, (LAYERS, RUN_BYTES), np.uint8)


def compute(pages: HostPages, wanted: Sequence[bytes], places: Sequence[int]) -> None:
    for key, page in zip(wanted, places):
        pages.pages[page] = content(key)


def put(cache: TieredKVCache, wanted: Sequence[bytes]) -> None:
    """Computes a prompt's blocks in the first pages and stores them whole."""
    compute(cache.device, wanted, range(len(wanted)))
    cache.store(wanted, np.arange(len(wanted))).wait()
    cache.device.pages[:] = 0xEE


def got(cache: TieredKVCache, wanted: Sequence[bytes]) -> int:
    """Loads what there is; how many leading blocks, each of them right."""
    cache.device.pages[:] = 0xEE
    count = min(cache.lookup(wanted), cache.device.num_pages)
    handle = cache.load(wanted, np.arange(count))
    valid = [handle.wait_layer(layer) for layer in range(LAYERS)]
    assert len(set(valid)) == 1 and valid[0] == handle.wait() <= handle.blocks
    check(cache.device, wanted[: valid[0]], range(valid[0]))
    return valid[0]


def check(pages: HostPages, wanted: Sequence[bytes], places: Sequence[int]) -> None:
    for key, page in zip(wanted, places):
        assert (pages.pages[page] == content(key)).all(), "wrong KV"


class FaultyReader:
    """A pool of threads whose requests a rule may spoil: rule(request, count so far) -> None to leave it, a negative
    errno, a number of bytes for a short transfer, "flip" for a flipped bit, or "stall" for an answer that never comes
    until release()."""

    def __init__(self, rule, depth: int = 4) -> None:
        self.name = "faulty"
        self.rule, self._inner, self._told, self._spoilt = rule, ThreadReader(threads=min(depth, 4)), [], {}
        self._stalled: list[Request] = []
        self._count, self._lock = 0, threading.Lock()

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            with self._lock:
                what = self.rule(request, self._count)
                self._count += 1
            if what == "stall":
                self._stalled.append(request)
            elif isinstance(what, int):
                self._told.append(Done(request.tag, what))
            else:
                self._spoilt[request.tag] = request if what == "flip" else None
                self._inner.submit([request])

    def release(self) -> None:
        """Carries out what stalled, long after it was given up; the answers can be polled when it returns."""
        late, self._stalled = self._stalled, []
        reader = ThreadReader(threads=1)
        reader.submit(late)
        answers = reader.poll(LONG_S, len(late))
        reader.close()
        assert len(answers) == len(late), "files do not answer"
        with self._lock:
            self._told += answers

    def poll(self, wait_s: float, few: int = 1) -> list[Done]:
        with self._lock:
            told, self._told = self._told, []
        if not told and not self._spoilt and wait_s > 0:
            threading.Event().wait(min(wait_s, 0.01))  # nothing will come: as a kernel would, wait
        for done in self._inner.poll(0.0 if told else wait_s):
            flipped = self._spoilt.pop(done.tag)
            if flipped is not None:
                from gpu.cache.tiers.host_arena import view

                view(flipped.address, flipped.num_bytes)[flipped.num_bytes // 2] ^= 16
            told.append(done)
        return told

    def close(self) -> None:
        self._inner.close()


EIO, ENOSPC = -errno.EIO, -errno.ENOSPC


def ends(call: Callable[[], object]) -> object:
    """What the call returns; AssertionError where it does not end."""
    out: list[object] = []
    thread = threading.Thread(target=lambda: out.append(call()), daemon=True)
    thread.start()
    thread.join(LONG_S)
    assert not thread.is_alive(), "it does not end"
    return out[0]
