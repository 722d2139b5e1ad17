"""Pages between pinned host memory and the GPU: scattered runs each way and both, and what decode loses meanwhile."""
from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.transfer import STAGING_BYTES, CudaPages
from gpu.calibrate.tier_rates import median_s
from pkvsim.devices.copy_way import DMA, KERNEL, STAGED

LAYERS = 32
MIB = 2**20


@dataclass(frozen=True, slots=True)
class CopyFigures:
    """GB/s of runs of run_bytes."""

    run_bytes: int
    in_gb_s: float
    out_gb_s: float
    both_in_gb_s: float
    both_out_gb_s: float


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """A decode step of 8 rows of 32K tokens, alone and while pages come in."""

    alone_us: float
    loading_us: float
    in_gb_s: float

    @property
    def slower_percent(self) -> float:
        return (self.loading_us / self.alone_us - 1) * 100


# The ways that are measured, by name: to the GPU and to the host. "chosen" is what a cache of these sizes chooses.
WAYS: dict[str, tuple[str, str] | None] = {
    "kernels": (KERNEL, KERNEL), "DMA": (DMA, DMA), "DMA in + kernel out": (DMA, KERNEL),
    "staged": (STAGED, STAGED), "staged by 4 MiB": (STAGED, STAGED), "chosen": None,
}  # fmt: skip
RING_BYTES = {"staged by 4 MiB": (4 * MIB,) * 3}  # of a slot, by way: those of a cache by default


def make_pages(num_pages: int, run_bytes: int, way: str = "chosen", layers: int = LAYERS) -> CudaPages:
    """Pages of K and V of every layer, random."""
    import cupy

    k, v = (
        [cupy.random.randint(0, 256, (num_pages, run_bytes), dtype=cupy.uint8) for _ in range(layers)] for _ in range(2)
    )
    cupy.cuda.Device().synchronize()
    return CudaPages(k, v, ways=WAYS[way], staging_bytes=RING_BYTES.get(way, STAGING_BYTES))


def scattered(run_bytes: int, total_bytes: int, way: str) -> CopyFigures:
    """Blocks of 2 * LAYERS runs at random places of both sides, layer by layer in, whole out; checked first.

    way: of WAYS.
    """
    blocks = total_bytes // (2 * LAYERS * run_bytes)
    pages = make_pages(2 * blocks, run_bytes, way)
    arena = HostArena(slots=2 * blocks, slot_bytes=pages.block_bytes, pin=True)
    rng = np.random.default_rng(0)
    # Loads and stores have pages and slots of their own, so that both may run at once.
    slots, places = rng.permutation(2 * blocks).astype(np.int64), rng.permutation(2 * blocks).astype(np.int32)
    ends = [(arena.addresses(part), place) for part, place in zip(np.split(slots, 2), np.split(places, 2))]
    check(pages, *ends[0], places[blocks:])

    def load() -> None:
        for ticket in pages.copy_in(*ends[0], after=pages.mark(), each_layer=True)[-1:]:
            ticket.wait()

    def store() -> None:
        pages.copy_out(ends[1][1], ends[1][0], after=pages.mark()).wait()

    num_bytes = blocks * pages.block_bytes
    in_s, out_s = median_s(load), median_s(store)
    both_in, both_out = together(load, store)
    arena.close()
    return CopyFigures(run_bytes, *(num_bytes / s / 1e9 for s in (in_s, out_s, both_in, both_out)))


def check(pages: CudaPages, addresses: np.ndarray, places: np.ndarray, spare: np.ndarray) -> None:
    """RuntimeError unless blocks that go out and come in to other pages are what they were."""
    import cupy

    pages.copy_out(places, addresses, after=pages.mark()).wait()
    pages.copy_in(addresses, spare, after=pages.mark(), each_layer=True)[-1].wait()
    for array in pages.arrays:
        if not bool((array[cupy.asarray(places)] == array[cupy.asarray(spare)]).all()):
            raise RuntimeError("pages came back changed")


def together(load: Callable[[], None], store: Callable[[], None], repeats: int = 5) -> tuple[float, float]:
    """(seconds of a load, of a store) while the other runs all the time."""
    out = []
    for body, other in ((load, store), (store, load)):
        stop = threading.Event()

        def keep_on() -> None:
            while not stop.is_set():
                other()

        thread = threading.Thread(target=keep_on)
        thread.start()
        out.append(median_s(body, repeats))
        stop.set()
        thread.join()
    return out[0], out[1]


def decode_while_loading(total_bytes: int, way: str, *, run_bytes: int, steps: int = 400) -> DecodeFigures:
    """Steps of 8 rows of 32K tokens, 32 query and 8 KV heads of 128, alone and while blocks come in without a pause."""
    import cupy

    from gpu.decode_engine import DecodeEngine
    from pkvsim import DecodeShape

    shape, rows, tokens = DecodeShape(32, 8, 128, 16), 8, 32768
    num_pages = rows * tokens // shape.page_size
    rng = np.random.default_rng(1)
    table = cupy.asarray(rng.permutation(num_pages).reshape(rows, -1).astype(np.int32))
    lens = cupy.full(rows, tokens, cupy.int32)
    k, v = (cupy.random.standard_normal((num_pages, 8, 16, 128), dtype=cupy.float32).astype(cupy.float16) for _ in "kv")
    q = cupy.random.standard_normal((rows, 32, 128), dtype=cupy.float32).astype(cupy.float16)
    engine = DecodeEngine(shape)
    engine.plan(lens, table)
    out = cupy.empty_like(q)

    def step_us() -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(10):
            engine.run(q, k, v, out=out)
        begin.record()
        for _ in range(steps):
            engine.run(q, k, v, out=out)
        end.record()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(begin, end) * 1e3 / steps

    blocks = total_bytes // (2 * LAYERS * run_bytes)
    pages = make_pages(blocks, run_bytes, way)
    arena = HostArena(slots=blocks, slot_bytes=pages.block_bytes, pin=True)
    addresses, places = arena.addresses(rng.permutation(blocks)), rng.permutation(blocks).astype(np.int32)
    step_us()
    alone = [step_us() for _ in range(3)]
    stop, loads = threading.Event(), []

    def keep_on() -> None:
        import time

        ready = pages.mark()  # of before: the loads wait for no step
        while not stop.is_set():
            begin = time.perf_counter()
            pages.copy_in(addresses, places, after=ready, each_layer=True)[-1].wait()
            loads.append(time.perf_counter() - begin)

    thread = threading.Thread(target=keep_on)
    thread.start()
    loading = [step_us() for _ in range(3)]
    stop.set()
    thread.join()
    arena.close()
    return DecodeFigures(statistics.median(alone), statistics.median(loading),
                         blocks * pages.block_bytes / statistics.median(loads[1:] or loads) / 1e9)  # fmt: skip
