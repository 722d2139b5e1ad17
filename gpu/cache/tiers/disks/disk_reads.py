"""Reads and writes of whole buffers, many at a time: one interface over io_uring, threads and NVMe passthrough.

`submit` hands over requests and returns at once; `poll` returns those that have ended. A buffer belongs to the kernel
from the one to the other, whatever happens to its request meanwhile. disk_tier bounds bytes in flight, and
disk_requests gives up on a stalled device.
"""
from __future__ import annotations

import bisect
import errno
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gpu.cache.tiers.host_arena import view

THREADS = 16  # of a pool: 64 KiB reads of a virtual disk are fastest there, and larger ones lose nothing


class Request(NamedTuple):
    """One read into a buffer, or one write from it."""

    tag: int  # who asks; of one request at a time
    fd: int
    offset: int
    address: int
    num_bytes: int
    write: bool = False


class Done(NamedTuple):
    """An ended request. result: bytes moved, or an error as -errno."""

    tag: int
    result: int


class Reader(Protocol):
    """What carries out requests."""

    name: str

    def submit(self, requests: Sequence[Request]) -> None:
        """Begins all of them. No more than the depth it was opened with may be under way."""

    def poll(self, wait_s: float, few: int = 1) -> list[Done]:
        """Those that have ended: waits until `few` have, at most wait_s; empty where none is or was under way."""

    def close(self) -> None:
        """Ends it. Requests under way keep their buffers."""


class ThreadReader:
    """preadv and pwritev in a pool of threads: works everywhere, at the price of a thread's wake-up a request."""

    __slots__ = ("name", "_todo", "_done", "_under_way", "_threads")

    def __init__(self, *, threads: int = THREADS) -> None:
        if threads < 1:
            raise ValueError(f"threads: expected >= 1, got {threads}")
        self.name = "preadv"
        self._todo: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._under_way = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (request := self._todo.get()) is not None:
            call = os.pwritev if request.write else os.preadv
            try:
                result = call(request.fd, [view(request.address, request.num_bytes)], request.offset)
            except OSError as error:
                result = -(error.errno or errno.EIO)
            self._done.put(Done(request.tag, result))

    def submit(self, requests: Sequence[Request]) -> None:
        self._under_way += len(requests)
        for request in requests:
            self._todo.put(request)

    def poll(self, wait_s: float, few: int = 1) -> list[Done]:
        if not self._under_way:
            return []
        out: list[Done] = []
        until = time.perf_counter() + wait_s
        try:
            while len(out) < min(few, self._under_way) and wait_s > 0:
                out.append(self._done.get(timeout=max(1e-6, until - time.perf_counter())))
            while True:
                out.append(self._done.get_nowait())
        except queue.Empty:
            pass
        self._under_way -= len(out)
        return out

    def close(self) -> None:
        for _ in self._threads:
            self._todo.put(None)


def _told_at(late: tuple[float, Done]) -> float:
    return late[0]


class LimitedReader:
    """Another reader slowed to a rate, as if its device were that slow: for measuring unlike tiers on one machine.

    idle_s: in which the device had nothing to do between two requests; behind_s: by how much later than the rate allows
    the requests had been read, in all; untold_s: by how much later than it could be a request was told, in all, as the
    caller waited for more or did something else.
    """

    __slots__ = ("name", "bytes_per_s", "idle_s", "behind_s", "untold_s", "_reader", "_free_s", "_under_way", "_late")

    def __init__(self, reader: Reader, bytes_per_s: float) -> None:
        self.name = f"{reader.name} limited to {bytes_per_s / 1e9:g} GB/s"
        self.idle_s = self.behind_s = self.untold_s = 0.0
        self._reader = reader
        self.bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._under_way: dict[int, tuple[float, int]] = {}  # tag -> when it was handed over, bytes
        self._late: list[tuple[float, Done]] = []  # ended, to be told at that time; in order

    def count_from_here(self) -> None:
        """Begins idle_s, behind_s and untold_s anew, with a device that has had nothing to do until this moment."""
        self.idle_s = self.behind_s = self.untold_s = 0.0
        self._free_s = max(self._free_s, time.perf_counter())

    def submit(self, requests: Sequence[Request]) -> None:
        now = time.perf_counter()
        for request in requests:
            self._under_way[request.tag] = now, request.num_bytes
        self._reader.submit(requests)

    def poll(self, wait_s: float, few: int = 1) -> list[Done]:
        until = time.perf_counter() + wait_s
        self._take(self._reader.poll(0.0))
        while True:
            now = time.perf_counter()
            due = bisect.bisect_right(self._late, now, key=_told_at)
            if due >= few or now >= until or not (self._late or self._under_way):
                told, self._late = self._late[:due], self._late[due:]
                self.untold_s += sum(now - at for at, _ in told)
                return [done for _, done in told]
            # When a request is told depends on its size and on when it was handed over, and not on when it ended: one
            # wait for all that are missing is enough, and the processor has the time between them for others.
            missing = few - len(self._late)
            if missing > 0 and self._under_way:
                self._take(self._reader.poll(until - now, min(missing, len(self._under_way))))
            else:
                time.sleep(max(0.0, min(self._late[min(few, len(self._late)) - 1][0], until) - now))

    def _take(self, ended: list[Done]) -> None:
        """Notes what has ended, and when to tell of it."""
        now = time.perf_counter()
        for done in ended:
            began, num_bytes = self._under_way.pop(done.tag)  # a device works on it from then on, not from its end
            self.idle_s += max(0.0, began - self._free_s)
            self._free_s = max(self._free_s, began) + num_bytes / self.bytes_per_s
            self.behind_s += max(0.0, now - self._free_s)
            self._late.append((self._free_s, done))

    def close(self) -> None:
        self._reader.close()
