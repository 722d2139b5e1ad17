"""The first token's load without a GPU: pages whose copies take the time that a driver and a link would.

All rates and bytes are a TENTH of the H200's, so that two cores read four disks; times and numbers of copies are its
own. Calls of the driver come one at a time and take DRIVER_COPY_S a copy (pkvsim.devices.copy_way has it of one H200);
two lanes share the link. Assumptions: that calls wait for each other, DRIVER_CALL_S, and that lanes share evenly.
"""
from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pool_bench import disks
from pool_bench.trace import DiskTrace, Tracer

from gpu.cache.tiers.device import NoPages, Ticket
from gpu.cache.tiers.disk_reads import LimitedReader
from gpu.cache.tiers.tiered_cache import TieredKVCache
from gpu.cache.tiers.transfer import BATCH_COPIES, PACED_BYTES

TENTH = 10
LAYERS, RUN_BYTES = 32, 6656  # of a tenth of 64 KiB, in whole sectors
LINK_BYTES_PER_S = 51e9 / TENTH
DRIVER_COPY_S, DRIVER_CALL_S = 0.9e-6, 1e-5
PAUSE_S = 0.1
CALLS = 3  # of a hand-over, beside its copies


class TimedTicket:
    """Copies that end at a time of time.perf_counter()."""

    __slots__ = ("_at",)

    def __init__(self, at: float) -> None:
        self._at = at

    def done(self) -> bool:
        return time.perf_counter() >= self._at

    def wait(self) -> None:
        time.sleep(max(0.0, self._at - time.perf_counter()))


class TimedPages(NoPages):
    """Keeps nothing, and asks for copies and ends them as CudaPages would by DMA."""

    __slots__ = ("_driver", "_free_s")

    def __init__(self, blocks: int) -> None:
        super().__init__(LAYERS * RUN_BYTES, blocks, LAYERS)
        self._driver = threading.Lock()
        self._free_s = [0.0, 0.0]  # when the lanes of host memory and of disks are through

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool, paced: bool = False
    ) -> Sequence[Ticket]:  # fmt: skip
        if not each_layer:
            return [self._ask(1, len(pages) * LAYERS)]
        tickets: list[TimedTicket] = []
        ahead = max(2, PACED_BYTES // TENTH // max(1, len(pages) * RUN_BYTES))
        for _ in range(LAYERS):
            if paced and len(tickets) >= ahead:
                tickets[-ahead].wait()
            tickets.append(self._ask(0, len(pages)))
        return tickets

    def _ask(self, lane: int, copies: int) -> TimedTicket:
        for _ in range(CALLS):
            with self._driver:
                time.sleep(DRIVER_CALL_S)
        for begin in range(0, copies, BATCH_COPIES):
            count = min(BATCH_COPIES, copies - begin)
            with self._driver:
                time.sleep(count * DRIVER_COPY_S)
                now = time.perf_counter()
                rate = LINK_BYTES_PER_S / (2 if self._free_s[1 - lane] > now else 1)
                self._free_s[lane] = max(self._free_s[lane], now) + count * RUN_BYTES / rate
        return TimedTicket(self._free_s[lane])


def load_beside_host(
    directory: Path, rates: Sequence[float], *, blocks: int, repeats: int = 5
) -> tuple[float, float, float, list[DiskTrace]]:  # fmt: skip
    """A prompt of `blocks` from host memory and limited disks of rates [1 + disks], bytes/s, of which a TENTH is taken:
    (median seconds of a load, seconds until load() returned, bound in seconds, the median's traces)."""
    rates = [rate / TENTH for rate in rates]
    device, limiters = TimedPages(blocks), dict[str, LimitedReader]()
    block_bytes, total = device.block_bytes, sum(rates)
    place = Path(tempfile.mkdtemp(dir=directory, prefix="pool-"))
    try:
        slots = [int(blocks * rate / total * 1.01) + 8 for rate in rates]
        stores = [disks.limited_disk(f"disk{at}", place, rate, count, block_bytes, pin=False, limiters=limiters,
                                     depth_bytes=disks.DEPTH_BYTES // TENTH)
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
        shutil.rmtree(place, ignore_errors=True)
    seconds, asked, traces = sorted(turns, key=lambda turn: turn[0])[repeats // 2]
    bound = max(blocks * block_bytes / total, blocks * block_bytes / LINK_BYTES_PER_S)
    return seconds, asked, bound, traces
