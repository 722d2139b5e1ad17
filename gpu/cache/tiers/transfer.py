"""Blocks between pinned host memory and the GPU's pages: by a few CTAs where runs are short, by the DMA engines above.

Loads and stores go to streams of their own that decode never waits for: blocks of host memory layer by layer on one,
whole blocks that disks deliver on another, so that neither waits behind the other, and stores on a third. An event
follows each layer. Figures behind the constants: an H200 on PCIe 5.0 x16 (55.5 GB/s each way), 29 November 2026, where
single copies of 4 to 64 KiB reach 1.5 to 17 GB/s, batched ones 2.2 to 36, and the kernels 49.6 to 52.3.
"""
from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence

import numpy as np

from gpu.inputs import arrays
from gpu.kernels.compile import load_kernel

THREADS, UNROLL = 512, 4  # of a CTA, and vectors that each thread has under way
DEFINES = {"THREADS": THREADS, "UNROLL": UNROLL}
VECTOR_BYTES = 16
MAX_VECTORS = 2**31 - 1  # of a launch
# Runs from which on the DMA engines copy, to the GPU and to the host. Runs of 64 KiB come in as fast as by the kernel
# (49.7 and 48.5 GB/s; to the host 40.0 and 51.4), and decode beside them loses 6 % where it loses 17 % beside the
# kernel, whose reads of host memory hold up those of its SM.
BATCHED_FROM_BYTES = 64 * 2**10, 512 * 2**10
SHORT_RUN_BYTES = 32 * 2**10
# More CTAs fill the link no better, and slow decode by 60 % and more, since more SMs wait for host memory: CTAs of 128
# threads and 8 vectors each did so from 64 on, and were as fast as these with 32 (one H200, 2026-11-29).
GATHER_CTAS, SCATTER_CTAS = (32, 16), (16, 8)  # for runs below SHORT_RUN_BYTES, and from it on


class EventTicket:
    """Copies up to an event. Keeps what they read of this process until they have ended."""

    __slots__ = ("event", "_kept", "_device")

    def __init__(self, event: object, device: int, kept: Sequence[object]) -> None:
        self.event, self._device, self._kept = event, device, kept

    def done(self) -> bool:
        return self.event.done

    def wait(self) -> None:
        import cupy

        with cupy.cuda.Device(self._device):
            self.event.synchronize()


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


class CudaPages:
    """The pages of all layers on one GPU, as gpu.cache.tiers.device.Device has it.

    k_pages, v_pages: an array of each layer, [num_pages, ...] of one shape, type and stride, the bytes of a page in one
    piece; PagedKVCache's, or views of combined caches, whose K and V of a page are one run of twice the length.
    `arrays` has them as K and V of layer 0, of layer 1 and so on. run_bytes: of each run; runs_per_layer: 1 of combined
    caches, else 2. Host blocks are in memory registered with CUDA.
    """

    __slots__ = ("num_layers", "num_pages", "block_bytes", "run_bytes", "runs_per_layer", "batched_from_bytes",
                 "gather_ctas", "scatter_ctas", "arrays", "_library", "_device", "_bases", "_host_bases",
                 "_page_stride", "_streams", "_gather", "_scatter", "_lock")  # fmt: skip

    def __init__(
        self, k_pages: Sequence[object], v_pages: Sequence[object], *,
        batched_from_bytes: tuple[int, int] = BATCHED_FROM_BYTES, gather_ctas: tuple[int, int] = GATHER_CTAS,
        scatter_ctas: tuple[int, int] = SCATTER_CTAS,
    ) -> None:  # fmt: skip
        """batched_from_bytes: runs from which on the DMA engines copy to the GPU, and to the host.

        Raises ValueError naming the argument.
        """
        import cupy

        if not len(k_pages) or len(k_pages) != len(v_pages):
            raise ValueError(f"k_pages, v_pages: expected one of each a layer, got {len(k_pages)} and {len(v_pages)}")
        self.arrays = [array for pair in zip(k_pages, v_pages) for array in pair]
        views = [arrays.view("k_pages" if at % 2 == 0 else "v_pages", array) for at, array in enumerate(self.arrays)]
        first = views[0]
        sizes = {"float16": 2, "bfloat16": 2, "float32": 4}
        item = sizes.get(first.dtype, 1)
        self.run_bytes = int(np.prod(first.shape[1:])) * item
        self._page_stride = first.strides[0] * item
        for at, view in enumerate(views):
            name = "k_pages" if at % 2 == 0 else "v_pages"
            if (view.device, view.dtype, view.shape, view.strides) != (first.device, first.dtype, first.shape,
                                                                       first.strides) or view.device < 0:
                raise ValueError(f"{name}: expected all layers' as {first}, got {view} in layer {at // 2}")
            if view.pointer % VECTOR_BYTES or self.run_bytes % VECTOR_BYTES or self._page_stride % VECTOR_BYTES:
                raise ValueError(f"{name}: expected pages on boundaries of {VECTOR_BYTES} bytes, got {view}")
        if not _in_one_piece(first.shape[1:], first.strides[1:]):
            raise ValueError(f"k_pages: expected the bytes of a page in one piece, got strides {first.strides}")
        self._library, self._device = first.library, first.device
        self.num_pages, self.num_layers = first.shape[0], len(k_pages)
        self.block_bytes = self.num_layers * 2 * self.run_bytes
        pointers, self.runs_per_layer = [view.pointer for view in views], 2
        if all(v == k + self.run_bytes for k, v in zip(pointers[::2], pointers[1::2])):
            pointers, self.runs_per_layer, self.run_bytes = pointers[::2], 1, 2 * self.run_bytes
        self.batched_from_bytes = batched_from_bytes
        short = self.run_bytes < SHORT_RUN_BYTES
        self.gather_ctas, self.scatter_ctas = gather_ctas[not short], scatter_ctas[not short]
        self._host_bases = np.array(pointers, np.int64)
        self._lock = threading.Lock()  # a kernel's arguments lie in one place, and threads of several disks launch it
        with cupy.cuda.Device(self._device):
            self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]  # layers, whole blocks, stores
            self._bases = cupy.asarray(self._host_bases)
            self._gather, self._scatter = (
                load_kernel("gather.cu", name, DEFINES, threads=THREADS)
                for name in ("pkv_gather", "pkv_scatter")
            )
            cupy.cuda.get_current_stream().synchronize()

    def mark(self) -> object:
        import cupy

        with cupy.cuda.Device(self._device):
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, arrays.current_stream(self._library, self._device))
        return event

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[EventTicket]:  # fmt: skip
        stream = self._streams[0 if each_layer else 1]
        step = self.runs_per_layer * (1 if each_layer else self.num_layers)
        return self._copy(stream, addresses, pages, after, step=step, to_host=False)

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> EventTicket:
        step = self.runs_per_layer * self.num_layers
        return self._copy(self._streams[2], addresses, pages, after, step=step, to_host=True)[0]

    def wait(self, ticket: EventTicket) -> None:
        import cupy

        if not ticket.done():
            stream = arrays.current_stream(self._library, self._device)
            cupy.cuda.runtime.streamWaitEvent(stream, ticket.event.ptr, 0)

    def _copy(
        self, stream: object, addresses: np.ndarray, pages: np.ndarray, after: object, *, step: int, to_host: bool
    ) -> list[EventTicket]:  # fmt: skip
        """All runs, `step` of each block at a time; a ticket after each step."""
        import cupy

        addresses, pages = np.ascontiguousarray(addresses, np.int64), np.ascontiguousarray(pages, np.int32)
        tickets = []
        with self._lock, cupy.cuda.Device(self._device):
            stream.wait_event(after)
            batched = self.run_bytes >= self.batched_from_bytes[to_host]
            kept: tuple[object, ...] = (self.arrays,)
            if not batched:
                packed = np.empty(3 * len(pages), np.int32)  # one copy brings both to the GPU
                packed[: 2 * len(pages)].view(np.int64)[:] = addresses
                packed[2 * len(pages) :] = pages
                with stream:
                    kept += (cupy.asarray(packed),)
            for run in range(0, self.runs_per_layer * self.num_layers, step):
                if batched:
                    self._copy_batched(stream, addresses, pages, run, step, to_host)
                else:
                    self._launch(stream, kept[1].data.ptr, len(pages), run, step, to_host)
                event = cupy.cuda.Event(block=True, disable_timing=True)
                event.record(stream)
                tickets.append(EventTicket(event, self._device, kept))
        return tickets

    def _launch(self, stream: object, packed: int, blocks: int, run: int, num_runs: int, to_host: bool) -> None:
        """packed: where the GPU has the hosts' addresses [blocks] int64 and behind them pages [blocks] int32."""
        vectors = num_runs * self.run_bytes // VECTOR_BYTES
        most = max(1, MAX_VECTORS // vectors)
        kernel, ctas = (self._scatter, self.scatter_ctas) if to_host else (self._gather, self.gather_ctas)
        for begin in range(0, blocks, most):
            count = min(most, blocks - begin)
            kernel(ctas, (
                packed + 8 * begin, packed + 8 * blocks + 4 * begin, self._bases.data.ptr, self._page_stride,
                self.run_bytes, count, run, num_runs,
            ), stream.ptr)  # fmt: skip

    def _copy_batched(
        self, stream: object, addresses: np.ndarray, pages: np.ndarray, run: int, num_runs: int, to_host: bool
    ) -> None:  # fmt: skip
        runs = np.arange(run, run + num_runs)
        hosts = (addresses[:, None] + runs * self.run_bytes).ravel()
        places = (self._host_bases[runs] + pages[:, None].astype(np.int64) * self._page_stride).ravel()
        targets, sources = (hosts, places) if to_host else (places, hosts)
        copy_runs(targets, sources, self.run_bytes, stream.ptr)


def _in_one_piece(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether an array of that shape and strides, in elements, has no gaps; an axis of one element may say anything."""
    wanted = 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        if length > 1 and stride != wanted:
            return False
        wanted *= length
    return True
