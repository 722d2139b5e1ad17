"""Time to the first token of a 128K prompt of Llama-3.1-8B whose KV is in the pool, but for its last chunk.

Layers are stand-ins of the model's sizes (matrix products of one layer's weights, attention over the loaded pages), so
that compute takes the time it would and depends on every page; no weights are needed.
"""
from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pool_bench.disks import host_store, keys_of, limited_disk, store_all
from pool_bench.noted import KEPT, VARIANTS, CopyTimes, NotedPages, ordered, pages_of
from pool_bench.trace import DiskTrace, Tracer

from gpu.cache.tiers.disks.disk_reads import LimitedReader
from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.tiered_cache import TieredKVCache
from gpu.cache.tiers.transfer import CudaPages
from pkvsim.memory.load_or_recompute import first_token_s

if TYPE_CHECKING:
    import torch

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 32, 32, 8, 128, 4096, 14336
PAGE, CHUNK = 16, 256
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * PAGE * HEAD_DIM * 2  # K and V of a page of all layers, FP16
FILE_BLOCKS = 16  # of one chunk file of the baseline: 256 tokens, 32 MiB
WARM_UP, REPEATS = 1, 3


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds. bound_s: of the larger of bytes over the tiers' rates and over the link, and the last chunk's compute,
    most of which is hidden where layers arrive one by one, which disks' do not (pkvsim.memory.load_or_recompute);
    predicted_s: the same with the rate at which runs of a layer's page come in. asked_s, arrived_s: until load()
    returned, and until the last disk had handed over; traces: of the disks. These and copies are of the repeat that
    ttft_s, the median, comes from."""

    what: str
    gb: float
    ttft_s: float
    compute_s: float
    bound_s: float
    predicted_s: float
    asked_s: float = 0.0
    arrived_s: float = 0.0
    traces: tuple[DiskTrace, ...] = ()
    copies: CopyTimes = CopyTimes()

    @property
    def over_bound(self) -> float:
        return self.ttft_s / self.bound_s


class Model:
    """The pages of all layers, and a chunk's pass through a layer."""

    def __init__(self, blocks: int) -> None:
        import torch

        self.blocks = blocks
        shape = (blocks, 2, KV_HEADS, PAGE, HEAD_DIM)  # K and V of a page beside each other: one run of 64 KiB
        both = [torch.empty(shape, dtype=torch.float16, device="cuda").normal_() for _ in range(LAYERS)]
        self.k, self.v = ([pages[:, part] for pages in both] for part in range(2))
        make = lambda rows, columns: torch.randn(rows, columns, dtype=torch.float16, device="cuda") * rows**-0.5  # noqa: E731
        wide = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.weights = make(HIDDEN, wide), make(HIDDEN, HIDDEN), make(HIDDEN, 2 * INNER), make(INNER, HIDDEN)
        self.hidden = torch.randn(CHUNK, HIDDEN, dtype=torch.float16, device="cuda")
        self.device = CudaPages(self.k, self.v)

    def layer(self, at: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [CHUNK, HIDDEN] after layer `at`, whose queries see every loaded page."""
        import torch

        qkv, out, up, down = self.weights
        q = (hidden @ qkv)[:, : Q_HEADS * HEAD_DIM].view(CHUNK, Q_HEADS, HEAD_DIM).transpose(0, 1)[None]
        k, v = (pages[at].transpose(0, 1).reshape(1, KV_HEADS, -1, HEAD_DIM) for pages in (self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        hidden = hidden + mixed[0].transpose(0, 1).reshape(CHUNK, HIDDEN) @ out
        gate, value = (hidden @ up).chunk(2, dim=1)
        return hidden + (torch.nn.functional.silu(gate) * value) @ down

    def first_token(self, wait_layer: Callable[[int], object]) -> torch.Tensor:
        """The chunk through all layers, each once its pages are there."""
        import torch

        hidden = self.hidden
        for at in range(LAYERS):
            wait_layer(at)
            hidden = self.layer(at, hidden)
        torch.cuda.synchronize()
        return hidden

    def checksums(self) -> list[float]:
        """Of every layer's pages, to see that what was loaded is what was stored."""
        arrays = (pages[at].reshape(-1) for pages in (self.k, self.v) for at in range(LAYERS))
        return [float(array[::101].double().sum()) for array in arrays]

    def clear(self) -> None:
        import torch

        for array in (*self.k, *self.v):
            array.zero_()
        torch.cuda.synchronize()


def median_s(body: Callable[[], None], before: Callable[[], None]) -> float:
    """Median wall time of body() after before(), which is not timed."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        before()
        begin = time.perf_counter()
        body()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


def from_pool(
    model: Model, what: str, rates: Sequence[float], directories: Sequence[Path], *, link_bytes_per_s: float,
    runs_bytes_per_s: float, compute_s: float, variants: Sequence[str] = (KEPT,),
) -> list[FirstToken]:  # fmt: skip
    """rates [1 + disks]: of host memory and of disks limited to theirs. link_bytes_per_s: of one piece;
    runs_bytes_per_s: of scattered runs of a layer's page, measured alone; variants: of VARIANTS, one after another from
    the same blocks; the pool is opened again for another number of buffers."""
    block_bytes = model.device.block_bytes
    whole, total = model.blocks * block_bytes, sum(rates)
    places = [Path(tempfile.mkdtemp(dir=directory, prefix="pool-")) for directory in directories]
    limiters: dict[str, LimitedReader] = {}
    keys, pages = keys_of(what, model.blocks), np.arange(model.blocks, dtype=np.int32)
    wanted, found = model.checksums(), []
    try:
        host = [host_store(int(model.blocks * rates[0] / total * 1.01) + 8, block_bytes, rates[0], pin=True)]
        # A disk has its buffers from its opening on. What it holds it finds again, and host memory is filled anew.
        for ring_depths, names in itertools.groupby(variants, lambda name: VARIANTS[name].ring_depths):
            disks = [
                limited_disk(f"disk{at}", place, rate, int(model.blocks * rate / total * 1.01) + 8, block_bytes,
                             pin=True, limiters=limiters, ring_depths=ring_depths)
                for at, (place, rate) in enumerate(zip(places, rates[1:]))
            ]  # fmt: skip
            with TieredKVCache(model.device, host=host, disks=disks, drift=1e9) as cache:
                if disks:
                    cache.store(keys, pages).wait()
                else:
                    store_all(cache, keys, group=model.blocks)
                if cache.lookup(keys) != model.blocks:
                    raise RuntimeError(f"stored {cache.lookup(keys)} of {model.blocks} blocks: {cache.stats()}")
                found += [_timed(model, cache, keys, pages, limiters, name, wanted) for name in names]
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
    of_tiers = whole / total if disks else 0.0
    layers = 1 if disks else model.device.load_steps
    bound, predicted = (float(first_token_s(max(of_tiers, whole / rate), compute_s, layers))
                        for rate in (link_bytes_per_s, runs_bytes_per_s))  # fmt: skip
    names = [what if name == KEPT else f"{what}: {name}" for name in variants]
    return [FirstToken(name, whole / 1e9, times[0], compute_s, bound, predicted, *times[1:])
            for name, times in zip(names, found)]  # fmt: skip


def _timed(
    model: Model, cache: TieredKVCache, keys: list[bytes], pages: np.ndarray, limiters: dict[str, LimitedReader],
    name: str, wanted: list[float],
) -> tuple[float, float, float, tuple[DiskTrace, ...], CopyTimes]:  # fmt: skip
    """(TTFT, asked, arrived, traces, copies) of the median load as the variant of that name says."""
    tracer, turns, variant, device = Tracer(cache, limiters), [], VARIANTS[name], cache.device
    try:
        with ordered(variant):
            noted = NotedPages(pages_of(variant, model.device))
            cache.device = noted

            def before() -> None:
                model.clear()
                noted.start()
                tracer.start()

            def body() -> None:
                begin = time.perf_counter()
                handle = cache.load(keys, pages)
                asked = time.perf_counter()
                handle.wait_layer(0)
                arrived = time.perf_counter()
                model.first_token(handle.wait_layer)
                end, traces = time.perf_counter(), tuple(tracer.stop())
                turns.append((end - begin, asked - begin, arrived - begin, traces, noted.stop(begin)))

            median_s(body, before)
    finally:
        cache.device = device
    if model.checksums() != wanted:
        raise RuntimeError(f"{name}: the pages came back changed")
    return sorted(turns, key=lambda turn: turn[0])[REPEATS // 2]


def from_files(model: Model, host_bytes_per_s: float, disk_bytes_per_s: float, directory: Path, *, host_share: float,
               compute_s: float) -> FirstToken:  # fmt: skip
    """Host memory, then one disk limited to a rate, by buffered files of one chunk each; then the compute."""
    import torch

    block_bytes = model.device.block_bytes
    in_host = int(model.blocks * host_share)
    place = Path(tempfile.mkdtemp(dir=directory, prefix="files-"))
    arena = HostArena(slots=in_host + FILE_BLOCKS, slot_bytes=block_bytes, pin=True)
    pages, mark = np.arange(model.blocks, dtype=np.int32), model.device.mark
    wanted = model.checksums()
    try:
        host_addresses = arena.addresses(np.arange(in_host))
        model.device.copy_out(pages[:in_host], host_addresses, after=mark()).wait()
        buffers = arena.addresses(np.arange(in_host, in_host + FILE_BLOCKS))
        piece = np.frombuffer(arena.span(in_host, FILE_BLOCKS), np.uint8)
        chunks = np.split(pages[in_host:], range(FILE_BLOCKS, model.blocks - in_host, FILE_BLOCKS))
        for at, chunk in enumerate(chunks):
            model.device.copy_out(chunk, buffers[: len(chunk)], after=mark()).wait()
            (place / str(at)).write_bytes(piece[: len(chunk) * block_bytes])

        def body() -> None:
            model.device.copy_in(host_addresses, pages[:in_host], after=mark(), each_layer=False)[0].wait()
            for at, chunk in enumerate(chunks):
                begin, num_bytes = time.perf_counter(), len(chunk) * block_bytes
                with open(place / str(at), "rb", buffering=0) as file:
                    file.readinto(memoryview(piece)[:num_bytes])
                time.sleep(max(0.0, num_bytes / disk_bytes_per_s - (time.perf_counter() - begin)))
                model.device.copy_in(buffers[: len(chunk)], chunk, after=mark(), each_layer=False)[0].wait()
            model.first_token(lambda layer: None)

        ttft = median_s(body, model.clear)
        torch.cuda.synchronize()
        if model.checksums() != wanted:
            raise RuntimeError("files: the pages came back changed")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        arena.close()
    whole = model.blocks * block_bytes
    load = whole * host_share / host_bytes_per_s + whole * (1 - host_share) / disk_bytes_per_s
    return FirstToken("host, then one disk by files", whole / 1e9, ttft, compute_s, load + compute_s, load + compute_s)
