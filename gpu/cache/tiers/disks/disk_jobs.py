"""What a disk is asked to do, and what it has done."""
from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from gpu.cache.tiers.device import Sums

# The fault of a job that no disk is to blame for: the load was cancelled, or the GPU took or gave no block.
UNTAKEN = "untaken"


@dataclass(slots=True, eq=False)
class ReadJob:
    """A block to be read. take(buffers of blocks [n] int64, jobs) is called in the porter's thread with the blocks that
    have arrived, their headers right, of jobs that share it; it returns their sums where they are taken to, which end
    after the buffers are free, None where it takes none. ended(jobs, fault) follows, fault None for those whose sums
    are right. Neither the call nor what it wakes may raise."""

    slot: int
    key: bytes
    tag: int
    take: Callable[[np.ndarray, list[ReadJob]], Sums | None]
    ended: Callable[[list[Any], str | None], None]
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class WriteJob:
    """A block to be written. fill(buffers [n], jobs) copies blocks of jobs that share it into the buffers and returns
    their sums [n, SUMS] uint64 once they are there; ended([job], fault) follows for each."""

    slot: int
    key: bytes
    tag: int
    fill: Callable[[np.ndarray, list[WriteJob]], np.ndarray]
    ended: Callable[[list[Any], str | None], None]
    cancelled: bool = False  # where it has not begun


class Phase(str, Enum):
    """What a disk's thread does with its time."""

    IDLE = "idle"  # it has nothing to do
    ASK = "ask"  # for blocks
    READ = "read"  # it waits for blocks that it has asked for
    SLOTS = "slots"  # it waits while buffers that the GPU has not emptied keep it from asking for more
    CHECK = "check"  # headers
    HAND_OVER = "hand over"  # to the porter, and taking back what that has handed on
    END = "end"  # it tells of jobs that have ended
    DRAIN = "drain"  # it waits for the porter, for copies to the GPU and their sums, with nothing left to read


class Stopwatch:
    """Wall and processor seconds of one thread by what it did; wall time that is no processor time, of work that does
    not wait, went to locks, Python's own among them, or to other processes."""

    __slots__ = ("wall_s", "cpu_s", "_phase", "_wall", "_cpu")

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = dict.fromkeys(Phase, 0.0), dict.fromkeys(Phase, 0.0)
        self._phase, self._wall, self._cpu = Phase.IDLE, time.perf_counter(), 0.0

    def begin(self, phase: Phase) -> None:
        """What the thread that calls does from here on."""
        before, wall, cpu = self._phase, time.perf_counter(), time.thread_time()
        self.wall_s[before] += wall - self._wall
        self.cpu_s[before] += cpu - self._cpu
        self._phase, self._wall, self._cpu = phase, wall, cpu


@dataclass(slots=True)
class DiskCounts:
    """What a disk has done: blocks, bytes of blocks, and seconds in which something was under way."""

    read: int = 0
    written: int = 0
    faults: int = 0
    busy_s: float = 0.0
    thread_s: float = 0.0  # processor time of its thread
    copies: int = 0  # parcels whose copy to the GPU has ended, and their sums
    copies_s: float = 0.0  # from giving one to the porter until the thread saw that, seconds in all
    porter_s: float = 0.0  # until the porter had handed it over, seconds in all
    spent: Stopwatch = field(default_factory=Stopwatch)
    last_fault: str = ""


@dataclass(slots=True, eq=False)
class Parcel:
    """Blocks that a disk has read, of jobs that share `take`, in buffers [n] of ring slots. wanted: the sums that they
    must have, [n] pairs. The porter puts it into `back` with the sums of all that it has handed over at once, of which
    the parcel's begin at `first`; None where nobody took it, also with what went wrong."""

    jobs: list[ReadJob]
    buffers: np.ndarray
    slots: list[int]
    wanted: list[tuple[int, int]]
    back: queue.SimpleQueue[Parcel]
    since: float  # by time.perf_counter()
    sums: Sums | None = None
    first: int = 0
    fault: str | None = None

    def find_wrong(self) -> list[bool]:
        """Which blocks [n] are not those that were stored, once their sums have ended."""
        found = self.sums.values()[self.first : self.first + len(self.jobs)]
        return (found != np.array(self.wanted, np.uint64)).any(1).tolist()


class Porter:
    """A thread that hands over what all disks have read: everything that has arrived, in one call for each load.

    Calls of a GPU's driver wait for each other. So disks do not make them, and the longer they take the fewer they are.
    """

    __slots__ = ("_parcels", "_thread")

    def __init__(self) -> None:
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tier porter", daemon=True)
        self._thread.start()

    def put(self, parcel: Parcel) -> None:
        """Has it handed over. It comes back, whatever happens."""
        self._parcels.put(parcel)

    def close(self) -> None:
        """Hands over what is there and ends the thread."""
        self._parcels.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._parcels.get()) is not None:
            parcels = [first]
            for _ in range(self._parcels.qsize()):
                parcel = self._parcels.get()
                if parcel is None:
                    self._parcels.put(None)
                else:
                    parcels.append(parcel)
            by_take: dict[object, list[Parcel]] = {}
            for parcel in parcels:
                by_take.setdefault(parcel.jobs[0].take, []).append(parcel)
            for together in by_take.values():
                self._hand_over(together)

    def _hand_over(self, parcels: list[Parcel]) -> None:
        """Of one load."""
        sums = fault = None
        jobs = [job for parcel in parcels for job in parcel.jobs]
        try:
            sums = jobs[0].take(np.concatenate([parcel.buffers for parcel in parcels]), jobs)
        except Exception as error:  # of the GPU: its blocks do not arrive
            fault = f"{type(error).__name__}: {error}"
        first = 0
        for parcel in parcels:
            parcel.sums, parcel.first, parcel.fault = sums, first, fault
            first += len(parcel.jobs)
            parcel.back.put(parcel)


def by_name(seconds: dict[Phase, float]) -> dict[str, float]:
    """Seconds of phases by their names."""
    return {phase.value: value for phase, value in seconds.items()}


def groups(jobs: list, name: str) -> list[list]:
    """Jobs by their equal attribute of that name, in order."""
    found: dict[object, list] = {}
    for job in jobs:
        found.setdefault(getattr(job, name), []).append(job)
    return list(found.values())


def error_name(number: int | None) -> str:
    """An errno as its name and what it means; EIO where there is none."""
    number = number or errno.EIO
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
