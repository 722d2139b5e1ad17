"""Loads and stores under way: what their callers wait on, and what disks and copies tell them."""
from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gpu.cache.tiers.device import Device, Sums, Ticket, has_ended, wait_ended
from gpu.cache.tiers.disks.disk_jobs import UNTAKEN, ReadJob, WriteJob
from pkvsim.memory.memory_pool import Read, Write


class Owner(Protocol):
    """What the handles tell the cache, in any thread."""

    device: Device

    def _check_own(self) -> None:
        """ValueError in a process forked from the cache's, in which nothing goes on."""

    def _failed(self, read: Read) -> None:
        """A disk gave no valid block."""

    def _after_copies(self, handle: LoadHandle) -> None:
        """All blocks of a load have been handed over."""

    def _stored(self, writes: Sequence[Write], ok: bool) -> None:
        """Writes have ended."""

    def _touch(self, keys: Sequence[bytes]) -> None:
        """A prompt has been stored."""

    def _count_fault(self, tier: int) -> None:
        """A disk failed once more."""

    def _device_failed(self, fault: str) -> None:
        """The device copied no blocks from or to host memory."""


class LoadHandle:
    """A load under way. blocks: how many leading blocks it set out to load; ended_s: when all copies had ended, by
    time.perf_counter(), as soon as a thread of the cache has seen it."""

    def __init__(self, cache: Owner, reads: Sequence[Read], pages: np.ndarray, after: object) -> None:
        self.blocks, self.ended_s = len(reads), math.nan
        self._cache, self._reads, self._pages, self._after = cache, reads, pages, after
        self._changed = threading.Condition()
        self._owed = 0  # blocks that a disk still owes
        self._is_asked = False  # whether all copies of host memory have been asked for that will be
        self._valid = len(reads)  # leading blocks that are right so far
        self._cancelled = False
        self._asking = 0  # calls of the device that are asking for copies
        self._layers: list[Ticket] = []  # of the blocks from host memory, as far as they have been asked for
        self._fault: str | None = None  # why the others' will not be
        self._sums: list[Sums] = []  # of the blocks from disks, which end after their copies
        self._jobs: list[ReadJob] = []

    def wait_layer(self, layer: int) -> int:
        """Lets the caller's stream wait until layer `layer` of the loaded blocks is there; returns how many leading
        blocks are valid, the same for every layer, fewer than `blocks` where a tier failed. Blocks this thread only as
        long as blocks of disks are on their way, which are compared where they arrive, and until the layer's copies
        have been asked for. ValueError after cancel(); RuntimeError where they could not be, but those of layers before
        it could: nothing writes to the pages any more after cancel()."""
        device = self._cache.device
        if not 0 <= layer < device.num_layers:
            raise ValueError(f"layer: expected [0, {device.num_layers}), got {layer}")
        valid = self._wait_asked(layer + 1)
        self._check_asked(layer + 1)
        for ticket in self._layers[layer : layer + 1]:
            device.wait(ticket)
        return valid

    @property
    def is_done(self) -> bool:
        """Whether wait() would not block."""
        self._cache._check_own()
        with self._changed:
            if self._cancelled or self._owed or not self._is_asked:
                return self._cancelled
            # From the last one, which ends last: a server asks at each step, and of most layers in vain.
            return all(map(has_ended, reversed(self._layers)))

    def wait(self) -> int:
        """Blocks this thread until everything is in its pages; returns how many leading blocks are valid. Raises what
        the device does where copies of host memory failed, and nothing writes to the pages any more then."""
        layers = self._cache.device.num_layers
        valid = self._wait_asked(layers)
        try:
            self._check_asked(layers)
            for ticket in self._layers:
                ticket.wait()
        except Exception:
            self.cancel()
            raise
        return valid

    def _wait_asked(self, layers: int) -> int:
        """Until disks owe nothing and copies of so many layers of host memory's blocks have been asked for, or will
        not be; how many leading blocks are valid."""
        self._cache._check_own()
        with self._changed:
            self._changed.wait_for(
                lambda: self._cancelled or not self._owed and (self._is_asked or len(self._layers) >= layers)
            )
            if self._cancelled:
                raise ValueError("load: expected one that was not cancelled")
            return self._valid

    def _check_asked(self, layers: int) -> None:
        if self._fault is not None and len(self._layers) < layers:
            raise RuntimeError(f"load: layers from {len(self._layers)} on could not be copied: {self._fault}")

    def cancel(self) -> None:
        """Gives the load up. When it returns nothing writes to the pages any more."""
        self._cache._check_own()
        with self._changed:
            self._cancelled = True
            for job in self._jobs:
                job.cancelled = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._asking)
            tickets = [*self._layers, *self._sums]
        for ticket in tickets:
            wait_ended(ticket)

    def _owe(self, jobs: Sequence[ReadJob]) -> None:
        """Disks are about to be asked for these blocks; nobody else has the handle yet."""
        self._jobs, self._owed = list(jobs), len(jobs)

    def _copy_host(self, addresses: np.ndarray, blocks: np.ndarray, *, aside: bool) -> None:
        """Copies the load's blocks of host memory at addresses [n]; aside: in a thread of the cache, a few of them at a
        time, and layers are told of one by one. blocks [n]: which of the load's they are."""
        device, pages = self._cache.device, self._pages[blocks]
        with self._changed:
            begins = not self._cancelled
            self._asking += begins
        fault: str | None = "it was interrupted"
        try:
            if not begins:
                pass
            elif aside:
                for ticket in device.copy_layers(addresses, pages, after=self._after):
                    with self._changed:
                        self._layers.append(ticket)
                        self._changed.notify_all()
                        if self._cancelled:
                            break
            else:
                self._layers += device.copy_in(addresses, pages, after=self._after, each_layer=True)
            fault = None
        except Exception as error:  # of the GPU: its blocks do not arrive
            fault = f"{type(error).__name__}: {error}"
            self._cache._device_failed(fault)
        finally:
            valid = self.blocks
            with self._changed:
                self._asking -= begins
                self._fault = fault
                if fault is not None and not self._layers:  # nobody has been told that any of them are there
                    valid, self._fault = int(blocks.min()), None
            self._asked(valid)

    def _take(self, buffers: np.ndarray, jobs: list[ReadJob]) -> Sums | None:
        """Called by the porter's thread with blocks that have arrived. No lock is held over the device's calls, which
        may take as long as a disk reads many blocks in, and the disks tell this handle of others meanwhile."""
        pages = self._pages[[job.tag for job in jobs]]
        with self._changed:
            if self._cancelled:
                return None
            self._asking += 1
        sums, device = None, self._cache.device
        try:
            ticket = device.copy_in(buffers, pages, after=self._after, each_layer=False)[0]
            try:
                sums = device.sums(pages, after=ticket)
            except Exception:  # of a GPU that has copied, into pages that are another's once this load has ended
                wait_ended(ticket)
                raise
        finally:
            with self._changed:
                self._asking -= 1
                if sums is not None:
                    self._sums.append(sums)
                self._changed.notify_all()
        return sums

    def _ended(self, jobs: list[ReadJob], fault: str | None) -> None:
        if fault is not None and fault != UNTAKEN:
            for job in jobs:
                self._cache._failed(self._reads[job.tag])
        self._less(len(jobs), False, self.blocks if fault is None else min(job.tag for job in jobs))

    def _asked(self, valid: int) -> None:
        """All copies of host memory have been asked for that will be; valid: as _less() has it."""
        self._less(0, True, valid)

    def _less(self, count: int, is_asked: bool, valid: int) -> None:
        """That many blocks that disks owed have ended; valid: leading blocks that they leave right."""
        with self._changed:
            self._valid = min(self._valid, valid)
            self._owed -= count
            self._is_asked |= is_asked
            if not self._owed:
                self._sums.clear()  # as all of them have ended
                self._changed.notify_all()
            if self._owed or not self._is_asked:
                return
        self._cache._after_copies(self)


class StoreHandle:
    """A store under way. blocks: how many blocks are being written."""

    def __init__(self, cache: Owner, writes: Sequence[Write], keys: Sequence[bytes], pages: np.ndarray,
                 after: object) -> None:  # fmt: skip
        self.blocks = len(writes)
        self._cache, self._writes, self._keys, self._pages, self._after = cache, writes, keys, pages, after
        self._changed = threading.Condition()
        self._uncopied = self._pending = len(writes)

    @property
    def is_copied(self) -> bool:
        """Whether wait_copied() would not block."""
        self._cache._check_own()
        with self._changed:
            return not self._uncopied

    def wait_copied(self) -> None:
        """Blocks this thread until the pages have been read and may be overwritten."""
        self._cache._check_own()
        with self._changed:
            self._changed.wait_for(lambda: not self._uncopied)

    def wait(self) -> None:
        """Blocks this thread until every block has been written, or could not be."""
        self._cache._check_own()
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def _copy(self, writes: Sequence[Write], addresses: np.ndarray) -> Ticket:
        pages = self._pages[[write.at for write in writes]]
        return self._cache.device.copy_out(pages, addresses, after=self._after)

    def _fill(self, buffers: np.ndarray, jobs: list[WriteJob]) -> np.ndarray:
        """Sums [n, SUMS] uint64 of the blocks, once they are in the buffers."""
        writes = [self._writes[job.tag] for job in jobs]
        ticket = self._copy(writes, buffers)
        try:
            sums = self._cache.device.sums(self._pages[[write.at for write in writes]], after=self._after)
            sums.wait()
        finally:
            ticket.wait()
        self._copied(len(jobs))
        return sums.values()

    def _copied(self, count: int) -> None:
        with self._changed:
            self._uncopied -= count
            if not self._uncopied:
                self._changed.notify_all()

    def _disk_ended(self, jobs: list[WriteJob], fault: str | None) -> None:
        writes = [self._writes[job.tag] for job in jobs]
        self._ended(writes, fault is None)
        if fault is not None and fault != UNTAKEN:
            for write in writes:
                self._cache._count_fault(write.place.tier)

    def _ended(self, writes: Sequence[Write], ok: bool) -> None:
        self._cache._stored(writes, ok)
        with self._changed:
            self._pending -= len(writes)
            last = not self._pending
            if last:
                self._uncopied = 0
        if last:
            self._cache._touch(self._keys)
            with self._changed:
                self._changed.notify_all()
