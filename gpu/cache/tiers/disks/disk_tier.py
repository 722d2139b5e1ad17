"""One disk of the pool at work: a thread that keeps it busy and hands on no block but those that were stored.

Reads and writes wait in one queue. Bytes under way are bounded; each request has a slot of a pinned ring, from its
submission until the GPU has taken the block out of it and added up its sums, or the write has ended. The thread looks
at headers, and at those sums. disk_requests says what has failed or stalled. A stalled disk gets nothing more to do,
and its buffers stay its own for as long as it may write to them.
"""
from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from gpu.cache.tiers.device import has_ended, wait_ended
from gpu.cache.tiers.disks.disk_files import HEADER_BYTES, DiskFiles, read_header, seal
from gpu.cache.tiers.disks.disk_jobs import (
    UNTAKEN,
    DiskCounts,
    Parcel,
    Phase,
    Porter,
    ReadJob,
    WriteJob,
    groups,
)  # fmt: skip
from gpu.cache.tiers.disks.disk_reads import Reader
from gpu.cache.tiers.disks.disk_requests import DiskRequests, Ended
from gpu.cache.tiers.host_arena import HostArena

# What has ended is checked and handed over once it is this part of what is under way: a hand-over to the GPU costs the
# processor about as much for many blocks as for one, and the disk has the rest to work on meanwhile.
BATCH_PART = 4
# The thread wakes earlier than that to ask for more, where a part of that many is under way: a disk whose rate grows
# with what it is asked for loses as much of it as is missing on average, half of what a wake waits for.
WAKE_FROM, WAKE_PART = 8, 8


class DiskTier:
    """The thread, queue and ring of one directory."""

    def __init__(
        self, files: DiskFiles, reader: Reader, ring: HostArena, porter: Porter, *, bytes_under_way: int,
        stall_s: float = 30.0, observe: Callable[[int, float], None] | None = None,
        stalled: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """ring: buffers of files.slot_bytes; porter: hands over what has been read; observe(bytes, seconds): told the
        rate of reads now and then; stalled(): told once, when a request is given up."""
        if ring.slot_bytes < files.slot_bytes:
            raise ValueError(f"ring: expected slots of {files.slot_bytes} bytes, got {ring.slot_bytes}")
        self.files = files
        self.counts = DiskCounts()
        self.ring, self._porter = ring, porter
        self._requests = DiskRequests(
            files, reader, ring, self.counts, stall_s=stall_s, observe=observe, stalled=stalled
        )  # fmt: skip
        self._depth = max(1, min(bytes_under_way // files.slot_bytes, ring.slots))
        self._wake = threading.Condition()
        self._jobs: deque[ReadJob | WriteJob] = deque()
        self._closing = self._is_stalled = False
        self._free = list(range(ring.slots))
        self._buffers = [ring.bytes_of(slot) for slot in self._free]
        self._arrived: list[Ended] = []  # to be looked at
        self._to_write: list[WriteJob] = []  # taken from the queue, not under way
        self._draining: deque[Parcel] = deque()  # copies to the GPU and their sums under way
        self._parcels = 0  # that the porter has not handed over
        self._back: queue.SimpleQueue[Parcel] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tier {files.directory.name}", daemon=True)
        self._thread.start()

    @property
    def is_stalled(self) -> bool:
        return self._is_stalled

    @property
    def reader_name(self) -> str:
        return self._requests.reader_name

    @property
    def queued(self) -> int:
        """Jobs that wait or are under way."""
        return len(self._jobs) + len(self._to_write) + len(self._requests.under_way) + len(self._arrived)

    @property
    def _busy(self) -> bool:
        return bool(self._requests.under_way or self._parcels or self._draining)

    def add(self, jobs: list[ReadJob] | list[WriteJob]) -> None:
        """Queues jobs. Each ends, whatever happens."""
        with self._wake:
            if not (self._closing or self._is_stalled):
                self._jobs.extend(jobs)
                self._wake.notify()
                return
        for job in jobs:
            job.ended([job], "the disk is gone")

    def close(self) -> None:
        """Finishes what is queued and ends the thread; buffers and file of a stalled disk are left to it."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self.files.fd < 0:  # an earlier call has closed it
            return
        is_left = self._requests.close()
        if is_left:
            self.ring.keep()
        self.files.close(keep_blocks=is_left)

    def _run(self) -> None:
        begin = self.counts.spent.begin
        while True:
            begin(Phase.IDLE)
            with self._wake:
                while not (self._jobs or self._busy or self._closing):
                    self._wake.wait()
                if self._closing and not (self._jobs or self._busy):
                    return
            busy = bool(self._requests.under_way)
            began = time.perf_counter()
            try:
                self._turn()
            except Exception as error:  # a fault of the ring: every job ends, and the disk is not used again
                self._give_up(f"{type(error).__name__}: {error}")
            self.counts.thread_s = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
            if busy or self._requests.under_way:
                self.counts.busy_s += time.perf_counter() - began

    def _turn(self) -> None:
        """One round: frees buffers, submits, and waits for what ends first."""
        begin, under_way = self.counts.spent.begin, self._requests.under_way
        self._free_copied()
        while self._draining and not (self._free or under_way):
            self._drain(Phase.SLOTS)
        begin(Phase.ASK)
        self._submit()
        if under_way:
            wait_for = max(min(WAKE_FROM, len(under_way) // BATCH_PART), len(under_way) // WAKE_PART, 1)
            begin(Phase.SLOTS if self._jobs and not self._free and len(under_way) < self._depth else Phase.READ)
            ended = self._poll(0.01, wait_for)
            self._free_copied()  # as the GPU has taken blocks meanwhile, and the disk needs their buffers
            begin(Phase.ASK)
            submitted = False
            try:
                self._submit()  # before what has ended is looked at, so that the disk has work meanwhile
                submitted = True
            finally:
                many = len(self._arrived) >= len(under_way) // BATCH_PART
                if many or len(ended) < wait_for or not (submitted and self._free):
                    self._finish()
            self._check_stall()
        elif self._parcels:
            begin(Phase.SLOTS if self._jobs else Phase.DRAIN)
            self._take_back()
        elif self._draining:
            self._drain(Phase.DRAIN)

    def _free_copied(self) -> None:
        """Takes back what the porter has handed over and the buffers of what has been copied, and waits for neither."""
        self.counts.spent.begin(Phase.HAND_OVER)
        while self._parcels and not self._back.empty():
            self._take_back()
        while self._draining and has_ended(self._draining[0].sums):
            self._drain(Phase.HAND_OVER)

    def _take_back(self) -> None:
        """Takes back the next parcel that the porter has handed over, and ends its jobs where nobody took it."""
        parcel = self._back.get()
        self._parcels -= 1
        self.counts.porter_s += time.perf_counter() - parcel.since
        if parcel.sums is not None:
            self._draining.append(parcel)
            return
        self._free += parcel.slots
        self._end_untaken(parcel, parcel.fault)

    def _drain(self, phase: Phase) -> None:
        """Takes back the buffers of the oldest hand-over once it has been copied, and ends its jobs by its sums. phase:
        what waiting for it is."""
        self.counts.spent.begin(phase)
        parcel = self._draining.popleft()
        fault = wait_ended(parcel.sums)
        self._free += parcel.slots
        self.counts.copies += 1
        self.counts.copies_s += time.perf_counter() - parcel.since
        if fault is not None:
            self._end_untaken(parcel, fault)
            return
        self.counts.spent.begin(Phase.END)
        right = []
        for job, is_wrong in zip(parcel.jobs, parcel.find_wrong()):
            if is_wrong:
                self._requests.end(job, "wrong sums")
            else:
                right.append(job)
        self.counts.read += len(right)
        if right:
            right[0].ended(right, None)

    def _end_untaken(self, parcel: Parcel, fault: str | None) -> None:
        """Ends jobs whose blocks did not reach the GPU. fault: of the GPU, None where a load was cancelled."""
        self.counts.spent.begin(Phase.END)
        self.counts.last_fault = fault or self.counts.last_fault
        parcel.jobs[0].ended(parcel.jobs, UNTAKEN)

    def _submit(self) -> None:
        reads: list[ReadJob] = []
        writes: list[WriteJob] = []
        cancelled: list[ReadJob | WriteJob] = []
        with self._wake:
            room = min(self._depth - len(self._requests.under_way), len(self._free))
            while self._jobs and len(reads) + len(writes) < room:
                job = self._jobs.popleft()
                if job.cancelled:
                    cancelled.append(job)
                elif isinstance(job, WriteJob):
                    writes.append(job)
                else:
                    reads.append(job)
        self._to_write += writes
        try:
            # A request is submitted as soon as its time begins: filling buffers waits for the GPU, and a request that
            # waited for that, and not for the disk, would count as stalled.
            if reads:
                slots = self._free[len(self._free) - len(reads) :]
                del self._free[len(self._free) - len(reads) :]
                self._requests.read(reads, slots)
        finally:
            for job in cancelled:  # with no lock held, as whoever is told may wait for others
                self._requests.end(job, UNTAKEN)
        self._write()

    def _write(self) -> None:
        """Copies blocks of jobs that have been taken from the queue from the GPU, seals them and submits them."""
        while self._to_write:
            group = groups(self._to_write, "fill")[0]
            requests, slots = [], [self._free.pop() for _ in group]
            buffers = self.ring.addresses(np.array(slots))
            try:
                sums = group[0].fill(buffers + HEADER_BYTES, group)
            except Exception as error:  # of the GPU: its blocks are not stored
                self._free += slots
                self.counts.last_fault = f"{type(error).__name__}: {error}"
                self._to_write = [job for job in self._to_write if job not in group]
                for job in group:
                    self._requests.end(job, UNTAKEN)
                continue
            self._to_write = [job for job in self._to_write if job not in group]
            for job, slot, buffer, of_block in zip(group, slots, buffers.tolist(), sums):
                seal(buffer, self.files.block_bytes, job.key, job.slot, of_block)
                request = self._requests.begin_write(job, slot)
                if request is None:
                    self._free.append(slot)
                else:
                    requests.append(request)
            if requests:
                self._requests.write(requests)

    def _poll(self, wait_s: float, few: int = 1) -> list[Ended]:
        """What has ended, which is to be looked at from here on."""
        ended, free = self._requests.poll(wait_s, few)
        self._free += free
        self._arrived += ended
        return ended

    def _finish(self) -> None:
        """Gives what was read to the porter, where its headers are right; ends what was written."""
        begin = self.counts.spent.begin
        begin(Phase.CHECK)
        ended, self._arrived = self._arrived, []
        arrived: dict[ReadJob, tuple[int, tuple[int, int]]] = {}
        block_bytes, buffers, requests, read_bytes = self.files.block_bytes, self._buffers, self._requests, 0
        for job, at, result in ended:
            fault = requests.fault_of(job, result)
            if isinstance(job, WriteJob):
                self._free.append(at)
                requests.end_write(job, fault)
                continue
            if fault is None and not job.cancelled:
                read_bytes += self.files.slot_bytes
                fault, sums = read_header(buffers[at], block_bytes, job.key, job.slot)
            if fault is None and not job.cancelled:
                arrived[job] = at, sums
            else:
                self._free.append(at)
                requests.end(job, fault or UNTAKEN)
        begin(Phase.HAND_OVER)
        for group in groups(list(arrived), "take"):
            slots, wanted = map(list, zip(*(arrived[job] for job in group)))
            buffers_of = self.ring.addresses(np.array(slots)) + HEADER_BYTES
            self._parcels += 1
            self._porter.put(Parcel(group, buffers_of, slots, wanted, self._back, time.perf_counter()))
        requests.observe(read_bytes)

    def _check_stall(self) -> None:
        if self._requests.find_stall():
            # This thread may have waited for the GPU since it last asked: what has ended meanwhile is not late.
            self._poll(0.0)
            self._finish()
            fault = self._requests.find_stall()
            if fault:
                self._give_up(fault)

    def _give_up(self, fault: str) -> None:
        """Ends every job; the ring slots of those under way belong to the disk until it tells of them."""
        with self._wake:
            self._is_stalled = True
            queued, self._jobs = list(self._jobs), deque()
        others = [job for job, _, _ in self._arrived] + self._to_write + queued
        self._free += [at for _, at, _ in self._arrived]
        self._arrived, self._to_write = [], []
        self._requests.give_up(fault, others)
