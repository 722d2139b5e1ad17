"""Blocks between pinned host memory and the GPU's pages, whichever of pkvsim.devices.copy_way's ways they go.

Loads and stores go to streams of their own that decode never waits for: blocks of host memory layer by layer on one,
whole blocks that disks deliver on another, and stores on a third. Blocks of host memory that a thread of the cache asks
for are paced: they go on the disks' stream, in small parts of which few are under way. Copies of one stream come in the
order asked for, so that a disk's blocks wait for those few and no more, whatever turns the DMA engine takes between
streams. An event follows each layer, or several layers where they are staged as one piece.
"""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpu.cache.dma import StagingRing, copy_runs
from gpu.cache.tiers.cuda_sums import CudaSums, SumsTicket
from gpu.cache.tiers.event_ticket import EventTicket
from gpu.inputs import arrays
from gpu.kernels.compile import load_kernel
from pkvsim.devices.copy_way import COPY_WAYS, DMA, KERNEL, STAGED, choose_copy_way, layers_in_piece

if TYPE_CHECKING:
    import cupy

    from gpu.kernels.launch import Kernel

THREADS, UNROLL = 512, 4  # of a CTA, and vectors that each thread has under way
DEFINES = {"THREADS": THREADS, "UNROLL": UNROLL}
VECTOR_BYTES = 16
MAX_VECTORS = 2**31 - 1  # of a launch
SHORT_RUN_BYTES = 32 * 2**10
# More CTAs fill the link no better, and slow decode by 60 % and more, since more SMs wait for host memory: CTAs of 128
# threads and 8 vectors each did so from 64 on, and were as fast as these with 32 (one H200, 2026-11-29).
GATHER_CTAS, SCATTER_CTAS = (32, 16), (16, 8)  # for runs below SHORT_RUN_BYTES, and from it on
STAGED_CTAS = 16  # within the GPU's memory: many times the link's rate, and few SMs in decode's way
# Slots, and bytes of one, of the rings of host memory's blocks, of disks' blocks and of stores. Large ones keep the
# calls for each GB few: a launch queue that is full would hold up every thread that launches. What several disks hand
# over comes in small parts, and more of them wait for their turn of the DMA engine.
STAGING_SLOTS = (2, 4, 2)
STAGING_BYTES = (64 * 2**20, 16 * 2**20, 64 * 2**20)
# Copies of one call of the driver, about 1 ms of it, in which other threads' calls may have to wait.
BATCH_COPIES = 1024
# Under way at most, of paced blocks from host memory, and in how many parts they are asked for: 10 ms of the link, so
# that it does not run dry while the thread that asks waits for a lock, and a disk's ring holds what it reads in several
# times as long. A part is one call of the driver where runs are of 64 KiB.
PACED_BYTES, PACED_PARTS = 512 * 2**20, 8


class CudaPages:
    """The pages of all layers on one GPU, as gpu.cache.tiers.device.Device has it.

    k_pages, v_pages: an array of each layer, [num_pages, ...] of one shape, type and stride, the bytes of a page in one
    piece; PagedKVCache's, or views of combined caches, whose K and V of a page are one run of twice the length.
    `arrays` has them as K and V of layer 0, of layer 1 and so on. run_bytes: of each run; runs_per_layer: 1 of combined
    caches, else 2; ways: of copies to the GPU and to the host; load_steps: in how many parts layers arrive from host
    memory. Host blocks are in memory registered with CUDA.
    """

    __slots__ = ("num_layers", "num_pages", "block_bytes", "run_bytes", "runs_per_layer", "gather_ctas",
                 "scatter_ctas", "arrays", "_library", "_device", "_bases", "_host_bases", "_page_stride", "_streams",
                 "_rings", "_gather", "_scatter", "_lock", "_ways", "_sums")  # fmt: skip

    def __init__(
        self, k_pages: Sequence[object], v_pages: Sequence[object], *, ways: tuple[str, str] | None = None,
        gather_ctas: tuple[int, int] = GATHER_CTAS, scatter_ctas: tuple[int, int] = SCATTER_CTAS,
        staging_bytes: tuple[int, int, int] = STAGING_BYTES,
    ) -> None:  # fmt: skip
        """ways: of COPY_WAYS, to the GPU and to the host, by default those that choose_copy_way() chooses.
        staging_bytes: of a ring's slot, for loads from host memory, for those from disks, and for stores; a ring has
        STAGING_SLOTS of them.

        Raises ValueError naming the argument.
        """
        import cupy

        if not len(k_pages) or len(k_pages) != len(v_pages):
            raise ValueError(f"k_pages, v_pages: expected one of each a layer, got {len(k_pages)} and {len(v_pages)}")
        if ways is not None and (len(ways) != 2 or not set(ways) <= set(COPY_WAYS)):
            raise ValueError(f"ways: expected two of {', '.join(COPY_WAYS)}, got {ways!r}")
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
        short = self.run_bytes < SHORT_RUN_BYTES
        self.gather_ctas, self.scatter_ctas = gather_ctas[not short], scatter_ctas[not short]
        self._host_bases = np.array(pointers, np.int64)
        self._lock = threading.Lock()  # a kernel's arguments lie in one place, and threads of several disks launch it
        layer_bytes = self.runs_per_layer * self.run_bytes
        pieces = [layers_in_piece(self.num_layers, layer_bytes, most_bytes=most, whole=at > 0)
                  for at, most in enumerate(staging_bytes)]  # fmt: skip
        to_gpu, to_host = ways if ways is not None else (
            choose_copy_way(self.run_bytes, pieces[0] * layer_bytes, to_host=False),
            choose_copy_way(self.run_bytes, pieces[2] * layer_bytes, to_host=True),
        )  # fmt: skip
        self._ways = [to_gpu, to_gpu, to_host]  # of copies of host memory's blocks, of disks' blocks, and to the host
        with cupy.cuda.Device(self._device):
            self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]  # layers, whole blocks, stores
            self._bases = cupy.asarray(self._host_bases)
            self._gather, self._scatter = (
                load_kernel("gather.cu", name, DEFINES, threads=THREADS)
                for name in ("pkv_gather", "pkv_scatter")
            )
            self._rings = self._make_rings(pieces, staging_bytes)
            self._sums = CudaSums(self._bases, page_stride=self._page_stride, run_bytes=self.run_bytes,
                                  device=self._device)  # fmt: skip
            cupy.cuda.get_current_stream().synchronize()

    def _make_rings(self, layers: Sequence[int], staging_bytes: Sequence[int]) -> list[StagingRing | None]:
        """A ring for each stream whose copies are staged. Where the GPU has no room for one, they are not."""
        rings: list[StagingRing | None] = []
        for at, (stream, most) in enumerate(zip(self._streams, staging_bytes)):
            to_host = at == 2
            piece_bytes = layers[at] * self.runs_per_layer * self.run_bytes
            ring = None
            if self._ways[at] == STAGED:
                try:
                    ring = StagingRing(
                        stream, layers=layers[at], piece_bytes=piece_bytes, to_host=to_host,
                        slots=STAGING_SLOTS[at], pieces=max(1, min(most // piece_bytes, self.num_pages)),
                        launch=functools.partial(
                            _launch_staged, self._scatter if to_host else self._gather, self._lock, self._bases,
                            self._page_stride, self.run_bytes,
                        ),
                    )  # fmt: skip
                except MemoryError:
                    self._ways[at] = choose_copy_way(self.run_bytes, self.run_bytes, to_host=to_host)
            rings.append(ring)
        return rings

    @property
    def ways(self) -> tuple[str, str]:
        return self._ways[0], self._ways[2]

    @property
    def load_steps(self) -> int:
        ring = self._rings[0]
        return self.num_layers if ring is None else -(-self.num_layers // ring.layers)

    def mark(self) -> object:
        import cupy

        with cupy.cuda.Device(self._device):
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, arrays.current_stream(self._library, self._device))
        return event

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[EventTicket]:  # fmt: skip
        return self._copy(0 if each_layer else 1, addresses, pages, after)

    def copy_layers(self, addresses: np.ndarray, pages: np.ndarray, *, after: object) -> Iterator[EventTicket]:
        return self._copies(0, addresses, pages, after, paced=True)

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> EventTicket:
        return self._copy(2, addresses, pages, after)[0]

    def sums(self, pages: np.ndarray, *, after: object) -> SumsTicket:
        return self._sums.ask_for(pages, after.event if isinstance(after, EventTicket) else after)

    def wait(self, ticket: EventTicket) -> None:
        import cupy

        if not ticket.done():
            stream = arrays.current_stream(self._library, self._device)
            cupy.cuda.runtime.streamWaitEvent(stream, ticket.event.ptr, 0)

    def _copy(self, lane: int, addresses: np.ndarray, pages: np.ndarray, after: object) -> list[EventTicket]:
        return list(self._copies(lane, addresses, pages, after, paced=False))

    def _copies(
        self, lane: int, addresses: np.ndarray, pages: np.ndarray, after: object, *, paced: bool
    ) -> Iterator[EventTicket]:  # fmt: skip
        """As _ask_for(). Where that raises, what it had asked for has ended, also where its thread is interrupted."""
        stream, ring = self._streams[1 if paced else lane], self._rings[lane]
        try:
            yield from self._ask_for(lane, stream, addresses, pages, after, paced)
        except GeneratorExit:  # whoever wants no more of them has tickets of what was asked for
            raise
        except BaseException:
            for one in (stream, *(() if ring is None else (ring.stream,))):
                with contextlib.suppress(Exception):  # of a GPU that has failed altogether and copies nothing
                    one.synchronize()
            raise

    def _ask_for(
        self, lane: int, stream: cupy.cuda.Stream, addresses: np.ndarray, pages: np.ndarray, after: object, paced: bool
    ) -> Iterator[EventTicket]:  # fmt: skip
        """All runs on the stream; a ticket for each layer of lane 0, one for all of the others. paced: by parts of the
        blocks, each once few enough are under way.

        No lock is held over more than one launch: a disk's blocks are handed over while another thread is still asking
        for many others'.
        """
        import cupy

        addresses, pages = np.ascontiguousarray(addresses, np.int64), np.ascontiguousarray(pages, np.int32)
        ring, to_host = self._rings[lane], lane == 2
        events: list[cupy.cuda.Event] = []
        with cupy.cuda.Device(self._device):
            kept: tuple[object, ...] = (self.arrays, self._bases)
            place = 0  # where the GPU has the pages, or hosts' addresses and pages
            if ring is not None:
                ring.stream.wait_event(after)
                with ring.stream:
                    kept += (ring, cupy.asarray(pages))
                place, last, layers = kept[-1].data.ptr, ring.last, ring.layers
            else:
                stream.wait_event(after)
                last, layers = stream, 1 if lane == 0 else self.num_layers
                if self._ways[lane] == KERNEL:
                    packed = np.empty(3 * len(pages), np.int32)  # one copy brings both to the GPU
                    packed[: 2 * len(pages)].view(np.int64)[:] = addresses
                    packed[2 * len(pages) :] = pages
                    with stream:
                        kept += (cupy.asarray(packed),)
                    place = kept[-1].data.ptr
        for layer in range(0, self.num_layers, layers):
            count = min(layers, self.num_layers - layer)
            run, num_runs = layer * self.runs_per_layer, count * self.runs_per_layer
            is_told = lane == 0 or layer + count == self.num_layers
            part = max(1, PACED_BYTES // (PACED_PARTS * num_runs * self.run_bytes) if paced else len(pages))
            with cupy.cuda.Device(self._device):  # of a thread, which does as it likes between two tickets
                for begin in range(0, max(1, len(pages)), part):
                    if paced and len(events) >= PACED_PARTS:
                        events[-PACED_PARTS].synchronize()
                    hosts, end = addresses[begin : begin + part], min(begin + part, len(pages))
                    if ring is not None:
                        ring.copy(hosts + run * self.run_bytes, place + 4 * begin, run, num_runs,
                                  num_runs * self.run_bytes, stream)  # fmt: skip
                    elif self._ways[lane] == DMA:
                        self._copy_batched(stream, hosts, pages[begin:end], run, num_runs, to_host)
                    else:
                        self._launch(stream, place, len(pages), range(begin, end), run, num_runs, to_host)
                    if paced or is_told:
                        events.append(cupy.cuda.Event(block=True, disable_timing=True))
                        events[-1].record(last)
            if is_told:
                ticket = EventTicket(events[-1], self._device, kept)
                for _ in range(count if lane == 0 else 1):
                    yield ticket

    def _launch(
        self, stream: object, packed: int, blocks: int, part: range, run: int, num_runs: int, to_host: bool
    ) -> None:  # fmt: skip
        """packed: where the GPU has the hosts' addresses [blocks] int64 and behind them pages [blocks] int32; part: of
        them."""
        vectors = num_runs * self.run_bytes // VECTOR_BYTES
        most = max(1, MAX_VECTORS // vectors)
        kernel, ctas = (self._scatter, self.scatter_ctas) if to_host else (self._gather, self.gather_ctas)
        for begin in range(part.start, part.stop, most):
            count = min(most, part.stop - begin)
            with self._lock:
                kernel(ctas, (
                    packed + 8 * begin, packed + 8 * blocks + 4 * begin, self._bases.data.ptr, self._page_stride,
                    self.run_bytes, count, run, num_runs,
                ), stream.ptr)  # fmt: skip

    def _copy_batched(
        self, stream: object, addresses: np.ndarray, pages: np.ndarray, run: int, num_runs: int, to_host: bool
    ) -> None:  # fmt: skip
        runs = np.arange(run, run + num_runs)
        most = max(1, BATCH_COPIES // num_runs)
        for begin in range(0, len(pages), most):
            hosts = (addresses[begin : begin + most, None] + runs * self.run_bytes).ravel()
            numbers = pages[begin : begin + most, None].astype(np.int64)
            places = (self._host_bases[runs] + numbers * self._page_stride).ravel()
            targets, sources = (hosts, places) if to_host else (places, hosts)
            copy_runs(targets, sources, self.run_bytes, stream.ptr)


def _launch_staged(
    kernel: Kernel, lock: threading.Lock, bases: cupy.ndarray, page_stride: int, run_bytes: int, hosts: int, pages: int,
    blocks: int, first_run: int, num_runs: int, stream: cupy.cuda.Stream,
) -> None:  # fmt: skip
    """Runs of pieces that begin with first_run: to the kernel they are runs 0 on of the arrays from there on."""
    with lock:
        kernel(STAGED_CTAS, (
            hosts, pages, bases.data.ptr + 8 * first_run, page_stride, run_bytes, blocks, 0, num_runs,
        ), stream.ptr)  # fmt: skip


def _in_one_piece(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether an array of that shape and strides, in elements, has no gaps; an axis of one element may say anything."""
    wanted = 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        if length > 1 and stride != wanted:
            return False
        wanted *= length
    return True
