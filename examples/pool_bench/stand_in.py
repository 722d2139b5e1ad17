"""The first token's load without a GPU: pages whose copies take the time that a driver and a link would.

All rates and bytes are a TENTH of the H200's, so that two cores read four disks; times and numbers of copies are its
own. Calls of the driver come one at a time and take DRIVER_COPY_S a copy (pkvsim.devices.copy_way has it of one H200),
DRIVER_CALL_S each; one engine copies, what each stream was given in its order. Between streams it is one of ENGINES,
which are assumptions: as asked for; in turn; or unfair, as what one H200 measured for two streams would be explained by
(2026-11-29: host memory's blocks at 34 GB/s beside disks' at 6, and the link no better used than that).
"""
from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pool_bench import disks
from pool_bench.noted import KEPT, VARIANTS, Variant
from pool_bench.trace import DiskTrace, Tracer

from gpu.cache.tiers.device import NoPages, Ticket
from gpu.cache.tiers.disks.disk_reads import LimitedReader
from gpu.cache.tiers.tiered_cache import TieredKVCache
from gpu.cache.tiers.transfer import BATCH_COPIES
from pkvsim.devices.copy_way import PIECE_BYTES, STAGED

TENTH = 10
LAYERS, RUN_BYTES = 32, 6656  # of a tenth of 64 KiB, in whole sectors
LINK_BYTES_PER_S = 53e9 / TENTH
DRIVER_COPY_S, DRIVER_CALL_S = 0.9e-6, 1e-5
PAUSE_S = 0.1
CALLS = 3  # of a hand-over, beside its copies and a call for each of its parts
AHEAD_S = 5e-4  # that the engine's thread decides ahead of its time, so that it sleeps seldom


@dataclass(frozen=True, slots=True)
class Engine:
    """turn_bytes: of a stream of host memory and of disks until the other one has its turn, None for the order asked
    for; rate: part of the link's while both have something to copy."""

    turn_bytes: tuple[int, int] | None = None
    rate: float = 1.0


ENGINES = {
    "in order": Engine(), "in turn": Engine((RUN_BYTES * 16, RUN_BYTES * 16)),
    "unfair": Engine((RUN_BYTES * 88, RUN_BYTES * 16), 0.75),
}  # fmt: skip


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


class Link:
    """The engine and what it has been given: copies of stream 0, of host memory, and 1, of disks."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._given = engine, threading.Condition()
        self._streams: tuple[deque, deque] = deque(), deque()  # of [number in the order asked for, bytes left, ticket]
        self._count, self._free_s, self._turn, self._left = 0, 0.0, 0, 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, stream: int, num_bytes: int) -> TimedTicket:
        ticket = TimedTicket()
        with self._given:
            self._streams[stream].append([self._count, num_bytes, ticket])
            self._count += 1
            self._given.notify()
        return ticket

    def close(self) -> None:
        with self._given:
            self._closed = True
            self._given.notify()
        self._thread.join()

    def _run(self) -> None:
        ended: deque[tuple[float, TimedTicket]] = deque()
        while True:
            with self._given:
                while not (self._closed or ended or any(self._streams)):
                    self._given.wait()
                if self._closed:
                    return
                now = time.perf_counter()
                if not ended:
                    self._free_s = max(self._free_s, now)
                while any(self._streams) and self._free_s < now + AHEAD_S:
                    ticket = self._copy()
                    if ticket is not None:
                        ended.append((self._free_s, ticket))
            if ended:
                at, ticket = ended.popleft()
                time.sleep(max(0.0, at - time.perf_counter()))
                ticket.end()
            else:
                time.sleep(AHEAD_S)

    def _copy(self) -> TimedTicket | None:
        """The next bytes; a ticket where they end it."""
        both, turns = all(self._streams), self._engine.turn_bytes
        if not both:
            at = 0 if self._streams[0] else 1
        elif turns is None:
            at = 0 if self._streams[0][0][0] < self._streams[1][0][0] else 1
        else:
            if self._left <= 0:
                self._turn = 1 - self._turn
                self._left = turns[self._turn]
            at = self._turn
        first = self._streams[at][0]
        count = min(first[1], self._left) if both and turns is not None else min(first[1], RUN_BYTES * 128)
        self._left -= count
        first[1] -= count
        self._free_s += count / (LINK_BYTES_PER_S * (self._engine.rate if both else 1.0))
        if first[1]:
            return None
        self._streams[at].popleft()
        return first[2]


class TimedPages(NoPages):
    """Keeps nothing, and asks for copies and ends them as CudaPages would by DMA."""

    __slots__ = ("link", "_driver", "_variant")

    def __init__(self, blocks: int, variant: Variant, engine: Engine) -> None:
        super().__init__(LAYERS * RUN_BYTES, blocks, LAYERS)
        self.link, self._variant, self._driver = Link(engine), variant, threading.Lock()

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool, paced: bool = False
    ) -> Sequence[Ticket]:  # fmt: skip
        variant = self._variant
        for _ in range(CALLS):
            self._call(DRIVER_CALL_S)
        if not each_layer:
            each = 1 if STAGED in (variant.host_way, variant.disks_way) else LAYERS
            return [self._ask(1, len(pages) * each, self.block_bytes // each)]
        tickets: list[TimedTicket] = []
        parts: list[TimedTicket] = []
        part = max(1, variant.paced_bytes // TENTH // variant.parts // RUN_BYTES) if paced else max(1, len(pages))
        layers = PIECE_BYTES // TENTH // RUN_BYTES if variant.host_way == STAGED else 1  # of a copy
        part = max(1, part // layers)
        for _ in range(0, LAYERS, layers):
            for begin in range(0, len(pages), part):
                if paced and len(parts) >= variant.parts:
                    parts[-variant.parts].wait()
                count = min(part, len(pages) - begin)
                parts.append(self._ask(int(paced and variant.one_stream), count, layers * RUN_BYTES))
            tickets += [parts[-1]] * layers
        return tickets[:LAYERS]

    def _ask(self, stream: int, copies: int, copy_bytes: int) -> TimedTicket:
        for begin in range(0, copies, BATCH_COPIES):
            count = min(BATCH_COPIES, copies - begin)
            self._call(count * DRIVER_COPY_S + DRIVER_CALL_S)
            ticket = self.link.give(stream, count * copy_bytes)
        return ticket

    def _call(self, seconds: float) -> None:
        with self._driver:
            time.sleep(seconds)


def load_beside_host(
    directory: Path, rates: Sequence[float], *, blocks: int, repeats: int = 5, variant: Variant = VARIANTS[KEPT],
    engine: str = "in order",
) -> tuple[float, float, float, list[DiskTrace]]:  # fmt: skip
    """A prompt of `blocks` from host memory and limited disks of rates [1 + disks], bytes/s, of which a TENTH is taken:
    (median seconds of a load, seconds until load() returned, bound in seconds, the median's traces). engine: of
    ENGINES."""
    rates = [rate / TENTH for rate in rates]
    device, limiters = TimedPages(blocks, variant, ENGINES[engine]), dict[str, LimitedReader]()
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
