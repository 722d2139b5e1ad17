"""What one disk has been asked for: whose requests are under way, when one has failed or is late, and who is told.

A request belongs to the slot of the pinned ring that it reads into or writes from. Whatever goes wrong ends in the
jobs' `ended(jobs, fault)`: an error, a short read, wrong sums, or a request under way for longer than stall_s.
After that the disk is given up, and the slots of what was under way stay its own until the reader tells of them.
"""
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

from gpu.cache.tiers.disks.disk_files import DiskFiles
from gpu.cache.tiers.disks.disk_jobs import UNTAKEN, DiskCounts, ReadJob, WriteJob, error_name
from gpu.cache.tiers.disks.disk_reads import Reader, Request
from gpu.cache.tiers.host_arena import HostArena

LATE_S = 0.1  # that close() gives a stalled disk to end what it was given up for
OBSERVED_BYTES = 64 * 2**20  # read between two reports of the rate


class Ended(NamedTuple):
    """A request that the reader has told of. slot: of the ring; result: bytes moved, or an error as -errno."""

    job: ReadJob | WriteJob
    slot: int
    result: int


class DiskRequests:
    """Requests of one disk from their submission on, and the ends of its jobs. For the disk's thread alone.

    under_way: by ring slot, each with its job and when it began, the oldest first.
    """

    __slots__ = ("under_way", "_files", "_reader", "_ring", "_counts", "_stall_s", "_observe", "_stalled", "_given_up",
                 "_reads", "_seen_bytes", "_seen_since")  # fmt: skip

    def __init__(
        self, files: DiskFiles, reader: Reader, ring: HostArena, counts: DiskCounts, *, stall_s: float,
        observe: Callable[[int, float], None] | None, stalled: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        """observe(bytes, seconds): told the rate of reads now and then; stalled(): told when the disk is given up."""
        self.under_way: dict[int, tuple[ReadJob | WriteJob, float]] = {}
        self._files, self._reader, self._ring, self._counts = files, reader, ring, counts
        self._stall_s, self._observe, self._stalled = stall_s, observe, stalled
        self._given_up: set[int] = set()
        self._reads = 0  # of what is under way
        self._seen_bytes, self._seen_since = 0, 0.0

    @property
    def reader_name(self) -> str:
        return self._reader.name

    def read(self, jobs: list[ReadJob], slots: list[int]) -> None:
        """Asks for blocks, into ring slots [len(jobs)]."""
        now = time.perf_counter()
        if not self._reads:  # writes may be under way, and the time before is none of reads
            self._seen_bytes, self._seen_since = 0, now
        self._reads += len(jobs)
        self.under_way.update((at, (job, now)) for at, job in zip(slots, jobs))
        address, fd, offset, num_bytes = self._ring.address, self._files.fd, self._files.offset, self._files.slot_bytes
        self._reader.submit([Request(at, fd, offset(job.slot), address(at), num_bytes) for at, job in zip(slots, jobs)])

    def begin_write(self, job: WriteJob, slot: int) -> Request | None:
        """The write of a sealed block in that ring slot, under way from here on, and to be submitted; None where its
        place in the file could not be cleared and the job has ended with that."""
        files = self._files
        try:
            files.begin(job.slot)
        except OSError as error:
            self.end(job, error_name(error.errno))
            return None
        self.under_way[slot] = job, time.perf_counter()
        return Request(slot, files.fd, files.offset(job.slot), self._ring.address(slot), files.slot_bytes, True)

    def write(self, requests: list[Request]) -> None:
        """Submits what begin_write() has made."""
        self._reader.submit(requests)

    def poll(self, wait_s: float, few: int = 1) -> tuple[list[Ended], list[int]]:
        """(What has ended, ring slots that the disk has let go after it was given up), waiting as Reader.poll does."""
        ended, free = [], []
        for tag, result in self._reader.poll(wait_s, few):
            if tag in self._given_up:
                self._given_up.remove(tag)
                free.append(tag)
            else:
                job, _ = self.under_way.pop(tag)
                self._reads -= isinstance(job, ReadJob)
                ended.append(Ended(job, tag, result))
        return ended, free

    def fault_of(self, job: ReadJob | WriteJob, result: int) -> str | None:
        """What the reader's result says went wrong."""
        if result < 0:
            return error_name(-result)
        if result != self._files.slot_bytes:
            return f"short {'write' if isinstance(job, WriteJob) else 'read'} of {result} bytes"
        return None

    def observe(self, num_bytes: int) -> None:
        """Counts what has been read, for the rate."""
        self._seen_bytes += num_bytes
        if self._observe is not None and self._seen_bytes >= OBSERVED_BYTES:
            now = time.perf_counter()
            self._observe(self._seen_bytes, now - self._seen_since)
            self._seen_bytes, self._seen_since = 0, now

    def end_write(self, job: WriteJob, fault: str | None) -> None:
        """As end(), of a write that the reader has told of."""
        if fault is None:
            try:
                self._files.finish(job.slot, job.key)
            except OSError as error:
                fault = error_name(error.errno)
        self.end(job, fault)

    def end(self, job: ReadJob | WriteJob, fault: str | None) -> None:
        """Counts a job and tells of it."""
        if fault is None:
            self._counts.written += isinstance(job, WriteJob)
            self._counts.read += isinstance(job, ReadJob)
        elif fault != UNTAKEN:
            self._counts.faults += 1
            self._counts.last_fault = fault
            if isinstance(job, ReadJob):
                with contextlib.suppress(OSError):  # the header or the block's sums refuse it again where this fails
                    self._files.begin(job.slot)
        job.ended([job], fault)

    def find_stall(self) -> str | None:
        """The fault of a disk whose oldest request has been under way for too long."""
        _, began = next(iter(self.under_way.values()), (None, float("inf")))  # dicts keep their order
        return f"stalled for {self._stall_s:g} s" if time.perf_counter() - began > self._stall_s else None

    def give_up(self, fault: str, others: list[ReadJob | WriteJob]) -> None:
        """Ends every job, those under way and others that the disk still owes."""
        jobs = [job for job, _ in self.under_way.values()] + others
        self._given_up.update(self.under_way)
        self.under_way.clear()
        self._reads = 0
        for job in jobs:
            self._counts.faults += 1
            self._counts.last_fault = fault
            job.ended([job], fault)
        if self._stalled is not None:
            self._stalled()

    def close(self) -> bool:
        """Ends the reader. Whether a disk that was given up may still write to its slots of the ring."""
        end = time.perf_counter() + LATE_S
        with contextlib.suppress(Exception):  # of a reader that has failed: what it has is left to it
            while self._given_up and (left := end - time.perf_counter()) > 0:
                self.poll(left, len(self._given_up))
        self._reader.close()
        return bool(self._given_up)
