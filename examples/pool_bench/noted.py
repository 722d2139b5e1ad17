"""When copies to the GPU were asked for and had ended, by the GPU's own clock; and windows and ways of them."""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu.cache.tiers import transfer
from gpu.cache.tiers.device import Ticket
from gpu.cache.tiers.transfer import CudaPages
from pkvsim.devices.copy_way import STAGED

MIB = 2**20
KEPT = "kept"  # what ships


@dataclass(frozen=True, slots=True)
class Variant:
    """paced_bytes in `parts` parts: of host memory's blocks under way beside disks'; to_gpu: of COPY_WAYS, None for the
    chosen one; ring_depths: a disk's buffers, in depths."""

    paced_bytes: int = transfer.PACED_BYTES
    parts: int = transfer.PACED_PARTS
    to_gpu: str | None = None
    ring_depths: int = 3


VARIANTS = {
    KEPT: Variant(),
    "two layers": Variant(768 * MIB, 2),
    "256 MiB": Variant(256 * MIB, 4),
    "1 GiB": Variant(1024 * MIB, 16),
    "all staged": Variant(to_gpu=STAGED),
    "ring 6": Variant(ring_depths=6),
}


def pages_of(variant: Variant, kept: CudaPages) -> CudaPages:
    """As the variant says; kept: as they ship, over the same arrays. To be made and used within ordered()."""
    if variant == VARIANTS[KEPT]:
        return kept
    ways = kept.ways if variant.to_gpu is None else (variant.to_gpu, kept.ways[1])
    return CudaPages(kept.arrays[::2], kept.arrays[1::2], ways=ways)


@contextmanager
def ordered(variant: Variant) -> Iterator[None]:
    """Copies of pages that are made and used inside go as the variant says."""
    names = {"PACED_BYTES": "paced_bytes", "PACED_PARTS": "parts"}
    before = {name: getattr(transfer, name) for name in names}
    try:
        for name, field in names.items():
            setattr(transfer, name, getattr(variant, field))
        yield
    finally:
        for name, value in before.items():
            setattr(transfer, name, value)


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """Of a load. host_asked_s, host_copied_s: from its start until host memory's blocks had been asked for and had
    arrived; copied_s: until the last disk's had. calls: that handed disks' blocks over, and means of them: blocks,
    call_ms that one took, queue_ms from its end until the GPU had copied them."""

    host_asked_s: float = 0.0
    host_copied_s: float = 0.0
    copied_s: float = 0.0
    calls: int = 0
    blocks: float = 0.0
    call_ms: float = 0.0
    queue_ms: float = 0.0

    def said(self) -> str:
        return (f"host asked {self.host_asked_s * 1e3:.0f} ms, copied {self.host_copied_s * 1e3:.0f}; disks copied "
                f"{self.copied_s * 1e3:.0f}: {self.calls} calls of {self.blocks:.1f} blocks, {self.call_ms:.2f} ms "
                f"each, {self.queue_ms:.1f} ms from there until copied.")  # fmt: skip


class NotedPages:
    """CudaPages that note their copies to the GPU from start() on."""

    def __init__(self, pages: CudaPages) -> None:
        self._pages, self._lock = pages, threading.Lock()
        self._base: Any = None
        self._began = 0.0
        self._notes: list[tuple[bool, int, float, float, Any]] = []  # layers, blocks, call's begin and end, event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pages, name)

    def start(self) -> None:
        """No copy may be under way."""
        import cupy

        self._notes, self._base = [], cupy.cuda.Event()
        self._base.record(self._pages._streams[0])
        self._base.synchronize()
        self._began = time.perf_counter()

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[Ticket]:  # fmt: skip
        begin = time.perf_counter()
        tickets = self._pages.copy_in(addresses, pages, after=after, each_layer=each_layer)
        self._note(each_layer, len(pages), begin, int(not each_layer))
        return tickets

    def copy_layers(self, addresses: np.ndarray, pages: np.ndarray, *, after: object) -> Iterator[Ticket]:
        begin = time.perf_counter()
        yield from self._pages.copy_layers(addresses, pages, after=after)
        self._note(True, len(pages), begin, 1)

    def _note(self, each_layer: bool, blocks: int, begin: float, stream: int) -> None:
        """Copies have been asked for, on that one of the streams."""
        import cupy

        end, event = time.perf_counter(), cupy.cuda.Event()
        ring = self._pages._rings[not each_layer]
        event.record(self._pages._streams[stream] if ring is None else ring.last)
        with self._lock:
            self._notes.append((each_layer, blocks, begin, end, event))

    def stop(self, begin: float) -> CopyTimes:
        """Of what has been copied since start(); all of it has ended. begin: of the load, by time.perf_counter()."""
        import cupy

        ends = [cupy.cuda.get_elapsed_time(self._base, note[-1]) / 1e3 + self._began for note in self._notes]
        host = [(note, end) for note, end in zip(self._notes, ends) if note[0]]
        disks = [(note, end) for note, end in zip(self._notes, ends) if not note[0]]
        if not disks:
            return CopyTimes()
        count = len(disks)
        return CopyTimes(
            max((note[3] for note, _ in host), default=begin) - begin,
            max((end for _, end in host), default=begin) - begin,
            max(end for _, end in disks) - begin, count, sum(note[1] for note, _ in disks) / count,
            sum(note[3] - note[2] for note, _ in disks) / count * 1e3,
            sum(end - note[3] for note, end in disks) / count * 1e3,
        )  # fmt: skip
