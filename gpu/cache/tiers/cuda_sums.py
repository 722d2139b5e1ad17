"""Blocks' sums (pkvsim.memory.blocks.block_sums) by the GPU, of pages that it holds.

A processor would have to fetch what a disk has just written from wherever that put it: 0.13 cores for each GB/s, by
XXH3, of 0.06 and 0.13 that the pool takes altogether for blocks of 2 MiB and 256 KiB (one H200's host, 2026-11-30).
"""
from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from gpu.cache.tiers.event_ticket import EventTicket
from gpu.kernels.compile import load_kernel
from pkvsim.memory.blocks.block_sums import SUMS

if TYPE_CHECKING:
    import cupy

THREADS, UNROLL = 256, 4  # of a CTA, and vectors that each thread has under way
DEFINES = {"THREADS": THREADS, "UNROLL": UNROLL}
CTAS = 32  # many times a disk's rate, and few SMs in decode's way


class SumsTicket(EventTicket):
    """Sums on their way to the host."""

    __slots__ = ("_found",)

    def __init__(self, event: object, device: int, kept: tuple[object, ...], found: np.ndarray) -> None:
        super().__init__(event, device, kept)
        self._found = found

    def values(self) -> np.ndarray:
        """[num_blocks, SUMS] uint64, once it has ended."""
        return self._found


class CudaSums:
    """The kernel, on a stream of its own: no copy waits for it."""

    __slots__ = ("_kernel", "_stream", "_lock", "_bases", "_page_stride", "_run_bytes", "_device")

    def __init__(self, bases: cupy.ndarray, *, page_stride: int, run_bytes: int, device: int) -> None:
        """bases [runs] int64 on the GPU: where page 0 of each run's array is; device: current while this is called."""
        import cupy

        self._bases, self._page_stride, self._run_bytes, self._device = bases, page_stride, run_bytes, device
        self._kernel = load_kernel("block_sums.cu", "pkv_block_sums", DEFINES, threads=THREADS)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._lock = threading.Lock()  # a kernel's arguments lie in one place

    def ask_for(self, pages: np.ndarray, after: cupy.cuda.Event) -> SumsTicket:
        """Sums of the blocks in pages [n] int32, once the event is reached."""
        import cupy

        with cupy.cuda.Device(self._device):
            memory = cupy.cuda.alloc_pinned_memory(len(pages) * SUMS * 8)
            found = np.frombuffer(memory, np.uint64, len(pages) * SUMS).reshape(-1, SUMS)
            stream = self._stream
            stream.wait_event(after)
            with stream:
                numbers = cupy.asarray(np.ascontiguousarray(pages, np.int32))
                sums = cupy.zeros(found.shape, cupy.uint64)
                with self._lock:
                    self._kernel(CTAS, (
                        numbers.data.ptr, self._bases.data.ptr, self._page_stride, self._run_bytes, len(pages),
                        len(self._bases), sums.data.ptr,
                    ), stream.ptr)  # fmt: skip
            to_host = cupy.cuda.runtime.memcpyDeviceToHost
            cupy.cuda.runtime.memcpyAsync(found.ctypes.data, sums.data.ptr, found.nbytes, to_host, stream.ptr)
            event = cupy.cuda.Event(block=True, disable_timing=True)
            event.record(stream)
        return SumsTicket(event, self._device, (self._bases, numbers, sums, memory), found)
