"""TieredKVCache with real pages: what comes back is what was stored, whichever way the bytes went."""
from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest
import torch
from gpu_needs import skip_below

from gpu.cache.dma import StagingRing
from gpu.cache.tiers import load_parts, transfer
from gpu.cache.tiers.event_ticket import EventTicket
from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.stores import DiskStore, HostStore
from gpu.cache.tiers.tiered_cache import TieredKVCache
from gpu.cache.tiers.transfer import CudaPages
from pkvsim.memory.blocks.block_sums import block_sums
from pkvsim.memory.tiers import Tier

LAYERS = 3


def make_pages(library: str, num_pages: int, shape: tuple[int, ...], dtype: str, combined: bool) -> tuple[list, list]:
    """K and V pages of every layer, random bytes."""
    k, v = [], []
    for _ in range(LAYERS):
        wide = (num_pages, 2, *shape) if combined else (2, num_pages, *shape)
        bytes_ = cupy.random.randint(0, 256, (*wide[:-1], wide[-1] * np.dtype(dtype).itemsize), dtype=cupy.uint8)
        both = bytes_.view(dtype)
        if library == "torch":
            both = torch.from_dlpack(both)
        k.append(both[:, 0] if combined else both[0])
        v.append(both[:, 1] if combined else both[1])
    cupy.cuda.Device().synchronize()
    return k, v


def bits(array: object) -> np.ndarray:
    """The pages' bytes on the host."""
    host = array.cpu().contiguous().numpy() if isinstance(array, torch.Tensor) else array.get()
    return np.ascontiguousarray(host).view(np.uint8).reshape(len(host), -1)


def store(name: str, kind: str, blocks: int, block_bytes: int, rate: float = 1e9) -> Tier:
    return Tier(name=name, kind=kind, capacity_bytes=blocks * block_bytes, read_bytes_per_s=rate, write_bytes_per_s=rate)


def keys(count: int, name: str = "") -> list[bytes]:
    return [hashlib.sha256(f"{name}{at}".encode()).digest() for at in range(count)]


def no_room_for(lost: int) -> Callable[..., StagingRing]:
    """Makes rings, but for the one of that number."""
    count = itertools.count()

    def make(*arguments: Any, **options: Any) -> StagingRing:
        if next(count) == lost:
            raise MemoryError
        return StagingRing(*arguments, **options)

    return make


@pytest.mark.parametrize(("library", "shape", "dtype", "combined", "way"), [
    ("cupy", (8, 16, 128), "float16", False, "kernel"), ("torch", (8, 16, 128), "float16", True, None),
    ("cupy", (1, 16, 64), "int8", True, "kernel"), ("cupy", (3, 1, 8), "float16", False, "kernel"),  # 48 bytes a run
    ("torch", (8, 16, 128), "float16", False, "dma"), ("cupy", (8, 64, 256), "float16", True, "dma"),
    ("torch", (8, 16, 128), "float16", True, "staged"), ("cupy", (8, 16, 128), "float16", False, "staged"),
    ("cupy", (3, 1, 8), "float16", False, "staged"), ("torch", (8, 16, 128), "float16", True, "room for disks' ring"),
])  # fmt: skip
def test_blocks_come_back_from_host_memory_and_disk(
    tmp_path, monkeypatch, library, shape, dtype, combined, way
) -> None:  # fmt: skip
    """Blocks of host memory are asked for in parts as they arrive, in line with those of disks."""
    num_pages, blocks = 64, 30
    monkeypatch.setattr(transfer, "PACED_BYTES", 2**20)
    if way == "room for disks' ring":  # host memory's blocks come by DMA in line with staged ones of disks
        way = "staged"
        monkeypatch.setattr(transfer, "StagingRing", no_room_for(0))
    k, v = make_pages(library, num_pages, shape, dtype, combined)
    pages = CudaPages(k, v, ways=None if way is None else (way, way), staging_bytes=(2**20, 2**19, 2**20))
    before = [bits(array) for array in (*k, *v)]
    rng = np.random.default_rng(0)
    places = rng.permutation(num_pages)[:blocks].astype(np.int32)
    targets = rng.permutation(num_pages)[:blocks].astype(np.int32)
    block_bytes = pages.block_bytes
    host = [HostStore(tier=store("host", "host", blocks, block_bytes, 2e9))]
    disks = [DiskStore(tier=store(name, "disk", blocks, block_bytes), directory=str(tmp_path / name), ring_bytes=2**20)
             for name in "ab"]  # fmt: skip
    with TieredKVCache(pages, host=host, disks=disks) as cache:
        cache.store(keys(blocks), places).wait()
        for array in (*k, *v):
            array[:] = 0
        handle = cache.load(keys(blocks), targets)
        assert [handle.wait_layer(layer) for layer in range(LAYERS)] == [blocks] * LAYERS
        after = [bits(array) for array in (*k, *v)]  # on the stream that was told to wait
        for old, new in zip(before, after):
            assert (new[targets] == old[places]).all()
            assert not new[np.setdiff1d(np.arange(num_pages), targets)].any()
        assert min(cache.stats()[name]["read"] for name in "ab") > 0
    with TieredKVCache(pages, disks=disks) as cache:  # a restart: what lay on the disks alone
        assert cache.stats()["blocks"] == blocks - blocks // 2


@pytest.mark.parametrize("ways", [("kernel", "kernel"), ("dma", "dma"), ("staged", "staged")])
def test_long_loads_come_layer_by_layer_from_another_thread(monkeypatch: pytest.MonkeyPatch, ways: tuple) -> None:
    """What the caller's stream is given after wait_layer(l) sees layer l, with few parts under way at once; a load that
    is given up writes nothing afterwards."""
    monkeypatch.setattr(load_parts, "LONG_LOAD_BYTES", 0)
    monkeypatch.setattr(transfer, "PACED_BYTES", 2**20)
    k, v = make_pages("torch", 512, (8, 16, 128), "float16", False)
    pages = CudaPages(k, v, ways=ways)
    places = np.random.default_rng(2).permutation(512)[:200].astype(np.int32)
    with TieredKVCache(pages, host=[HostStore(tier=store("host", "host", 200, pages.block_bytes))]) as cache:
        cache.store(keys(200), places).wait()
        stored = [bits(array)[places] for array in (*k, *v)]
        for array in (*k, *v):
            array.zero_()
        handle = cache.load(keys(200), places)
        seen = []
        for layer in range(LAYERS):
            assert handle.wait_layer(layer) == 200
            seen.append((k[layer].clone(), v[layer].clone()))
        for wanted, found in zip(stored, [side[at] for at in (0, 1) for side in seen]):
            assert (bits(found)[places] == wanted).all()
        assert handle.wait() == 200
        handle = cache.load(keys(200), places)
        handle.cancel()
        for array in (*k, *v):
            array.fill_(3)
        torch.cuda.synchronize()
        cache.load(keys(200), np.setdiff1d(np.arange(512), places)[:200]).wait()
        assert all((array[places.tolist()] == 3).all() for array in (*k, *v))


def test_pages_beyond_4_gib() -> None:
    """64-bit offsets on both sides."""
    page_bytes, num_pages = 1 << 20, 4400
    skip_below(3 * page_bytes * num_pages)
    k = cupy.zeros((num_pages, page_bytes), cupy.uint8)
    v = cupy.zeros((num_pages, page_bytes), cupy.uint8)
    pages = CudaPages([k], [v], ways=("kernel", "kernel"))
    arena = HostArena(slots=4, slot_bytes=pages.block_bytes, pin=True)
    content = np.random.default_rng(1).integers(0, 256, (4, pages.block_bytes), np.uint8)
    for slot in range(4):
        arena.bytes_of(slot)[: pages.block_bytes] = content[slot].tobytes()
    where = np.array([num_pages - 1, 0, 4100, 2050], np.int32)
    addresses = arena.addresses(np.arange(4))
    pages.copy_in(addresses, where, after=pages.mark(), each_layer=True)[-1].wait()
    for slot, page in enumerate(where.tolist()):
        assert (k[page].get() == content[slot, :page_bytes]).all()
        assert (v[page].get() == content[slot, page_bytes:]).all()
    assert not k[num_pages - 2].any() and not k[1].any()
    pages.copy_out(where[::-1].copy(), addresses, after=pages.mark()).wait()
    assert bytes(arena.bytes_of(0)[: pages.block_bytes]) == content[3].tobytes()
    arena.close()


def test_a_load_waits_for_what_the_pages_are_used_for_and_nobody_waits_for_the_load() -> None:
    """A long kernel on the caller's stream reads the pages first; the next one sees what was loaded."""
    k, v = make_pages("cupy", 32, (8, 16, 128), "float16", False)
    pages = CudaPages(k, v)
    with TieredKVCache(pages, host=[HostStore(tier=store("host", "host", 32, pages.block_bytes))]) as cache:
        cache.store(keys(16), np.arange(16)).wait()
        stored = bits(k[0])[:16]
        k[0][:] = 1
        busy = cupy.ones((4096, 4096), cupy.float32)
        for _ in range(50):
            busy = busy @ busy * 1e-4
        seen_before = k[0][16:].copy()
        handle = cache.load(keys(16), np.arange(16, 32))
        assert handle.wait_layer(0) == 16
        seen_after = k[0][16:].copy()
        assert (seen_before == 1).all() and (bits(seen_after) == stored).all()


@pytest.mark.parametrize(("library", "shape", "dtype", "combined"), [
    ("cupy", (8, 16, 128), "float16", False), ("torch", (8, 16, 128), "float16", True), ("cupy", (1, 1, 8), "float16", True),
    ("torch", (8, 64, 256), "float16", False),
])  # fmt: skip
@pytest.mark.parametrize("blocks", [1, 37])
def test_sums_are_those_of_the_definition(library, shape, dtype, combined, blocks) -> None:
    k, v = make_pages(library, 64, shape, dtype, combined)
    pages = CudaPages(k, v)
    places = np.random.default_rng(blocks).permutation(64)[:blocks].astype(np.int32)
    runs = [bits(array)[places] for pair in zip(k, v) for array in pair]
    sums = pages.sums(places, after=pages.mark())
    sums.wait()
    assert sums.done() and (sums.values() == block_sums(np.concatenate(runs, 1))).all()


def test_a_block_that_changed_on_its_way_is_none_of_the_loaded(tmp_path, monkeypatch) -> None:
    """One bit, in the pages that a disk's blocks have been copied to: what is behind it is not valid, nor asked again."""
    k, v = make_pages("cupy", 64, (8, 16, 128), "float16", False)
    pages, copy_in = CudaPages(k, v), CudaPages.copy_in

    def flipping(self: CudaPages, addresses: np.ndarray, places: np.ndarray, **options: Any) -> Any:
        tickets = copy_in(self, addresses, places, **options)
        if 40 + 7 in places:
            tickets[-1].wait()
            k[1][47].view(np.uint16)[3, 5, 9] ^= 64
            tickets = [EventTicket(self.mark(), 0, ())] * len(tickets)
        return tickets

    monkeypatch.setattr(CudaPages, "copy_in", flipping)
    disks = [DiskStore(tier=store(name, "disk", 20, pages.block_bytes), directory=str(tmp_path / name)) for name in "ab"]
    with TieredKVCache(pages, disks=disks) as cache:
        cache.store(keys(20), np.arange(20)).wait()
        before = [bits(array)[:20] for array in (*k, *v)]
        handle = cache.load(keys(20), np.arange(40, 60))
        assert handle.wait_layer(0) == handle.wait() == 7
        for old, array in zip(before, (*k, *v)):
            assert (bits(array)[40:47] == old[:7]).all()
        faults = [cache.stats()[name] for name in "ab"]
        assert sum(one["faults"] for one in faults) == 1 and "wrong sums" in {one["last_fault"] for one in faults}
        assert cache.lookup(keys(20)) == 7
