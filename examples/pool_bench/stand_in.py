"""The first token's load without a GPU: pages whose copies take the time that a driver and a link would.

All rates and bytes are a TENTH of the H200's, so that two cores read four disks; times and numbers of copies are its
own. Calls of the driver come one at a time and take DRIVER_COPY_S a copy (pkvsim.devices.copy_way has it of one H200),
DRIVER_CALL_S each; one engine copies in the order asked for, as CudaPages has host memory's blocks and those of disks
on one stream.
"""
from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pool_bench import disks
from pool_bench.noted import KEPT, VARIANTS, Variant
from pool_bench.trace import DiskTrace, Tracer

from gpu.cache.tiers.device import NoPages, Sums, Ticket
from gpu.cache.tiers.disks.disk_reads import LimitedReader
from gpu.cache.tiers.tiered_cache import TieredKVCache
from gpu.cache.tiers.transfer import BATCH_COPIES
from pkvsim.devices.copy_way import PIECE_BYTES, STAGED
from pkvsim.memory.blocks.block_sums import SUMS

TENTH = 10
LAYERS, RUN_BYTES = 32, 6656  # of a tenth of 64 KiB, in whole sectors
LINK_BYTES_PER_S = 53e9 / TENTH
DRIVER_COPY_S, DRIVER_CALL_S = 0.9e-6, 1e-5
PAUSE_S = 0.1
CALLS = 3  # of a hand-over, beside its copies and a call for each of its parts
SUMS_CALLS = 5  # of its sums: a wait, their blocks' numbers, zeros, the kernel, and the way back


class TimedTicket:
    """Copies that end when the engine says so."""

    __slots__ = ("_ended",)

    def __init__(self) -> None:
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        self._ended.wait()


class TimedSums:
    """Sums of nothing, that end with the copies before them."""

    __slots__ = ("_after", "_count")

    def __init__(self, after: TimedTicket | None, count: int) -> None:
        self._after, self._count = after, count

    def done(self) -> bool:
        return self._after is None or self._after.done()

    def wait(self) -> None:
        if self._after is not None:
            self._after.wait()

    def values(self) -> np.ndarray:
        return np.zeros((self._count, SUMS), np.uint64)


class Link:
    """The engine and what it has been given."""

    def __init__(self) -> None:
        self._given = threading.Condition()
        self._copies: deque[tuple[float, int, TimedTicket]] = deque()  # when it was given each, and its bytes
        self._free_s, self._closed = 0.0, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, num_bytes: int) -> TimedTicket:
        ticket = TimedTicket()
        with self._given:
            self._copies.append((time.perf_counter(), num_bytes, ticket))
            self._given.notify()
        return ticket

    def close(self) -> None:
        with self._given:
            self._closed = True
            self._given.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._given:
                while not (self._closed or self._copies):
                    self._given.wait()
                if self._closed:
                    return
                given_s, num_bytes, ticket = self._copies.popleft()
            self._free_s = max(self._free_s, given_s) + num_bytes / LINK_BYTES_PER_S
            time.sleep(max(0.0, self._free_s - time.perf_counter()))
            ticket.end()


class TimedPages(NoPages):
    """Keeps nothing, and asks for copies and ends them as CudaPages would by DMA."""

    __slots__ = ("link", "_driver", "_variant")

    def __init__(self, blocks: int, variant: Variant) -> None:
        super().__init__(LAYERS * RUN_BYTES, blocks, LAYERS)
        self.link, self._variant, self._driver = Link(), variant, threading.Lock()

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[Ticket]:  # fmt: skip
        if each_layer:
            return list(self._ask_for_layers(len(pages), paced=False))
        for _ in range(CALLS):
            self._call(DRIVER_CALL_S)
        each = 1 if self._variant.to_gpu == STAGED else LAYERS
        return [self._ask(len(pages) * each, self.block_bytes // each)]

    def copy_layers(self, addresses: np.ndarray, pages: np.ndarray, *, after: object) -> Iterator[Ticket]:
        return self._ask_for_layers(len(pages), paced=True)

    def _ask_for_layers(self, blocks: int, *, paced: bool) -> Iterator[Ticket]:
        variant = self._variant
        for _ in range(CALLS):
            self._call(DRIVER_CALL_S)
        parts: list[TimedTicket] = []
        part = max(1, variant.paced_bytes // TENTH // variant.parts // RUN_BYTES) if paced else max(1, blocks)
        layers = PIECE_BYTES // TENTH // RUN_BYTES if variant.to_gpu == STAGED else 1  # of a copy
        part = max(1, part // layers)
        for first in range(0, LAYERS, layers):
            for begin in range(0, blocks, part):
                if paced and len(parts) >= variant.parts:
                    parts[-variant.parts].wait()
                count = min(part, blocks - begin)
                parts.append(self._ask(count, layers * RUN_BYTES))
            yield from [parts[-1]] * min(layers, LAYERS - first)

    def sums(self, pages: np.ndarray, *, after: TimedTicket | None) -> Sums:
        for _ in range(SUMS_CALLS):
            self._call(DRIVER_CALL_S)
        return TimedSums(after, len(pages))

    def _ask(self, copies: int, copy_bytes: int) -> TimedTicket:
        for begin in range(0, copies, BATCH_COPIES):
            count = min(BATCH_COPIES, copies - begin)
            self._call(count * DRIVER_COPY_S + DRIVER_CALL_S)
            ticket = self.link.give(count * copy_bytes)
        return ticket

    def _call(self, seconds: float) -> None:
        with self._driver:
            time.sleep(seconds)


def load_beside_host(
    directory: Path, rates: Sequence[float], *, blocks: int, repeats: int = 5, variant: Variant = VARIANTS[KEPT]
) -> tuple[float, float, float, list[DiskTrace]]:  # fmt: skip
    """A prompt of `blocks` from host memory and limited disks of rates [1 + disks], bytes/s, of which a TENTH is taken:
    (median seconds of a load, seconds until load() returned, bound in seconds, the median's traces)."""
    rates = [rate / TENTH for rate in rates]
    device, limiters = TimedPages(blocks, variant), dict[str, LimitedReader]()
    block_bytes, total = device.block_bytes, sum(rates)
    place = Path(tempfile.mkdtemp(dir=directory, prefix="pool-"))
    try:
        slots = [int(blocks * rate / total * 1.01) + 8 for rate in rates]
        stores = [disks.limited_disk(f"disk{at}", place, rate, count, block_bytes, pin=False, limiters=limiters,
                                     depth_bytes=disks.DEPTH_BYTES // TENTH, ring_depths=variant.ring_depths)
                  for at, (rate, count) in enumerate(zip(rates[1:], slots[1:]))]  # fmt: skip
        host = disks.host_store(slots[0], block_bytes, rates[0], pin=False)
        keys, pages = disks.keys_of("stand-in", blocks), np.arange(blocks, dtype=np.int32)
        with TieredKVCache(device, host=[host], disks=stores, drift=1e9) as cache:
            cache.store(keys, pages).wait()
            tracer, turns = Tracer(cache, limiters), []
            for _ in range(repeats):
                time.sleep(PAUSE_S)  # for what follows a load: its blocks may be displaced again
                tracer.start()
                begin = time.perf_counter()
                handle = cache.load(keys, pages)
                asked = time.perf_counter()
                if handle.wait() < blocks:
                    raise RuntimeError(f"not all of {blocks} blocks were loaded: {cache.stats()}")
                turns.append((time.perf_counter() - begin, asked - begin, tracer.stop()))
    finally:
        device.link.close()
        shutil.rmtree(place, ignore_errors=True)
    seconds, asked, traces = sorted(turns, key=lambda turn: turn[0])[repeats // 2]
    bound = max(blocks * block_bytes / total, blocks * block_bytes / LINK_BYTES_PER_S)
    return seconds, asked, bound, traces
