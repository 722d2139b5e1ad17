"""Copies by the DMA engines: of single runs, and of whole pieces of blocks by way of a ring in the GPU's memory."""
from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import cupy


QUEUES = "32"


def ask_for_queues() -> None:
    """Has CUDA deal this process's streams to 32 of the GPU's queues, not to 8, unless the user has said how many.

    Streams of one queue wait for each other's events: examples/results/h200_pool.md has what that may cost loads and
    stores at once. To be called before the process first uses CUDA, which looks once.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", QUEUES)


class _Attributes(ctypes.Structure):  # CUmemcpyAttributes of CUDA 12.8
    _fields_ = [
        ("order", ctypes.c_int), ("source_kind", ctypes.c_int), ("source_id", ctypes.c_int),
        ("target_kind", ctypes.c_int), ("target_id", ctypes.c_int), ("flags", ctypes.c_uint),
    ]  # fmt: skip


@functools.cache
def _batch_copy() -> object | None:
    """The driver's cuMemcpyBatchAsync, None where it has none (before CUDA 12.8)."""
    return getattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync", None)


def copy_runs(targets: np.ndarray, sources: np.ndarray, run_bytes: int, stream: int) -> None:
    """Copies runs sources [n] to targets [n], addresses int64, by the DMA engines. RuntimeError where that fails."""
    import cupy

    batch = _batch_copy()
    if batch is None:
        for target, source in zip(targets.tolist(), sources.tolist()):
            cupy.cuda.runtime.memcpyAsync(target, source, run_bytes, cupy.cuda.runtime.memcpyDefault, stream)
        return
    sizes = np.full(len(targets), run_bytes, np.uint64)
    attributes, first, failed = _Attributes(order=1), ctypes.c_size_t(0), ctypes.c_size_t(0)  # 1: stream order
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)]
    status = batch(*pointers, ctypes.c_size_t(len(targets)), ctypes.byref(attributes), ctypes.byref(first),
                   ctypes.c_size_t(1), ctypes.byref(failed), ctypes.c_void_p(stream))  # fmt: skip
    if status:
        raise RuntimeError(f"cuMemcpyBatchAsync: status {status} at copy {failed.value} of {len(targets)}")


class StagingRing:
    """A ring of pieces in the GPU's memory between host blocks and pages, for copies of one direction.

    The DMA engine and the kernel work on streams of their own, and an event of each slot lets the one wait for the
    other, so that both are busy and no thread waits. A piece is the same layers of one block, in one piece on the host
    and in the ring; the kernel takes its runs to the block's page, or collects them from there.

    dma_stream: of the DMA engine, unless a copy is given another one, of which a ring may have any number: events keep
    a slot's users apart; stream: of the kernel; last: that of what comes last, whose end is the copy's.
    """

    __slots__ = ("layers", "dma_stream", "stream", "to_host", "_launch", "_positions", "_pieces", "_table", "_memory",
                 "_filled", "_empty", "_slots", "_next", "_lock")  # fmt: skip

    def __init__(
        self, dma_stream: cupy.cuda.Stream, *, layers: int, piece_bytes: int, slots: int, pieces: int, to_host: bool,
        launch: Callable[[int, int, int, int, int, cupy.cuda.Stream], None],
    ) -> None:  # fmt: skip
        """layers: of a piece of piece_bytes; slots: at least 2, one to be filled while another is emptied; pieces: of a
        slot; launch(hosts, pages, blocks, first_run, num_runs, stream): starts the kernel on pieces whose addresses
        the GPU has at `hosts`, and page numbers at `pages`. MemoryError where the GPU has no room."""
        import cupy

        self.layers, self.to_host, self._launch = layers, to_host, launch
        self._slots, self._positions = slots, pieces
        self._memory = cupy.empty(slots * pieces * piece_bytes, cupy.uint8)
        self._pieces = self._memory.data.ptr + np.arange(slots * pieces, dtype=np.int64) * piece_bytes
        self._table = cupy.asarray(self._pieces)
        self.dma_stream = dma_stream
        # Its CTAs are few and short, and what they wait for meanwhile is a slot that the DMA engine needs again.
        self.stream = cupy.cuda.Stream(non_blocking=True, priority=-1)
        self._filled, self._empty = (
            [cupy.cuda.Event(disable_timing=True) for _ in range(slots)] for _ in range(2)
        )  # fmt: skip
        self._next = 0
        self._lock = threading.Lock()

    @property
    def last(self) -> cupy.cuda.Stream:
        return self.dma_stream if self.to_host else self.stream

    def copy(
        self, hosts: np.ndarray, pages: int, first_run: int, num_runs: int, num_bytes: int,
        dma_stream: cupy.cuda.Stream | None = None,
    ) -> None:  # fmt: skip
        """Starts copies of num_runs runs, num_bytes in all, of each block from first_run on. hosts [n] int64: where
        they are on the host; pages: where the GPU has the blocks' page numbers [n] int32; dma_stream: in place of the
        ring's, of rings to the GPU."""
        dma_stream = self.dma_stream if dma_stream is None else dma_stream
        for begin in range(0, len(hosts), self._positions):
            part = hosts[begin : begin + self._positions]
            with self._lock:
                slot, self._next = self._next, (self._next + 1) % self._slots
                place = slot * self._positions
                staged, table = self._pieces[place : place + len(part)], self._table.data.ptr + 8 * place
                first, second = (self.stream, dma_stream) if self.to_host else (dma_stream, self.stream)
                first.wait_event(self._empty[slot])
                if self.to_host:
                    self._launch(table, pages + 4 * begin, len(part), first_run, num_runs, first)
                else:
                    copy_runs(staged, part, num_bytes, first.ptr)
                self._filled[slot].record(first)
                second.wait_event(self._filled[slot])
                if self.to_host:
                    copy_runs(part, staged, num_bytes, second.ptr)
                else:
                    self._launch(table, pages + 4 * begin, len(part), first_run, num_runs, second)
                self._empty[slot].record(second)
