"""The tiered cache on pages of host memory: what is stored is loaded, from several tiers, over restarts."""
import os
import threading
import time

import numpy as np
import pytest
from pool_cases import (
    BLOCK_BYTES,
    LAYERS,
    FaultyReader,
    check,
    compute,
    content,
    device,
    disk,
    got,
    host,
    keys,
    put,
)  # fmt: skip

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.disks.disk_files import DiskFiles
from gpu.cache.tiers.disks.open_reader import open_reader
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.retention import TinyLfu

pytestmark = pytest.mark.usefixtures("who_asks")


@pytest.fixture(params=["io_uring", "preadv"])
def reader(request):
    try:
        open_reader(depth=2, kind=request.param).close()
    except OSError as error:
        pytest.skip(f"{request.param}: {error}")
    return request.param


def test_blocks_come_back_from_all_tiers(tmp_path, reader):
    stores = {"host": [host(rate=2e9)], "disks": [disk(tmp_path / "a", reader=reader), disk(tmp_path / "b", reader=reader)]}
    with TieredKVCache(device(), **stores) as cache:
        prompt = keys("one", 20)
        put(cache, prompt)
        assert got(cache, prompt) == 20 and got(cache, keys("other", 3)) == 0
        stats = cache.stats()
        assert [stats[name]["written"] for name in "ab"] == [5, 5]
        assert reader in stats["a"]["reader"] and stats["a"]["faults"] == 0
        # A branch of the prompt shares its blocks; some pages alone are filled where there are fewer.
        branch = prompt[:7] + keys("branch", 2)
        assert got(cache, branch) == 7
        handle = cache.load(prompt, np.array([9, 3, 5]))
        assert handle.wait() == 3
        check(cache.device, prompt[:3], [9, 3, 5])
        cache.free(prompt)
        assert got(cache, prompt) == 0 and cache.stats()["blocks"] == 0


def test_a_restart_finds_what_was_complete(tmp_path):
    prompt = keys("kept", 12)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")], contents="model") as cache:
        put(cache, prompt)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")], contents="model") as cache:
        assert got(cache, prompt) == 12
        put(cache, keys("more", 30))  # displaces part of it
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")], contents="model") as cache:
        assert got(cache, keys("more", 30)) == 30 and got(cache, prompt) == 2
    with pytest.raises(ValueError, match="another|expected blocks of"):
        TieredKVCache(device(), disks=[disk(tmp_path / "a")], contents="another model")
    # A larger tier keeps what it had, a smaller one what it has room for.
    for blocks in (40, 5):
        with TieredKVCache(device(), disks=[disk(tmp_path / "a", blocks)], contents="model") as cache:
            assert cache.stats()["blocks"] == min(32, blocks)


def test_policies_are_those_of_the_pool():
    with TieredKVCache(device(), host=[host(4)], admission=TinyLfu(256)) as cache:
        often = keys("often", 4)
        put(cache, often)
        for _ in range(3):
            assert got(cache, often) == 4
        put(cache, keys("once", 2))
        assert got(cache, often) == 4
        assert cache.hold(often, 10.0) == 4
        cache.expire(11.0)


def test_loading_is_left_alone_where_computing_is_faster(tmp_path):
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", rate=BLOCK_BYTES)]) as cache:  # a block a second
        prompt = keys("slow", 5)
        put(cache, prompt)
        assert cache.lookup(prompt) == 5
        assert cache.lookup(prompt, lambda blocks: (5 - blocks) * 0.01) == 0
        assert cache.lookup(prompt, lambda blocks: (5 - blocks) * 50.0) == 5


def test_nothing_reaches_the_pages_after_a_cancel(tmp_path):
    gate = threading.Event()
    made = []

    def slow(request, count):
        if not request.write:
            gate.wait(5.0)
        return None

    def make(depth, buffers):
        made.append(FaultyReader(slow, depth))
        return made[-1]

    with TieredKVCache(device(), disks=[disk(tmp_path / "a", reader=make)]) as cache:
        prompt = keys("gone", 8)
        put(cache, prompt)
        handle = cache.load(prompt, np.arange(8))
        handle.cancel()
        cache.device.pages[:8] = 0xDD  # they are somebody else's
        gate.set()
        with pytest.raises(ValueError, match="cancelled"):
            handle.wait_layer(0)
        assert cache.load(prompt, np.arange(8, 16)).wait() == 8  # behind the other's blocks in the disk's queue
        check(cache.device, prompt, range(8, 16))
        assert (cache.device.pages[:8] == 0xDD).all() and (cache.device.pages[16:] == 0xEE).all()
        assert cache.stats()["quarantined"] == 0


class GatedDisks(HostPages):
    """Copies of disks' blocks wait for a gate."""

    __slots__ = ("entered", "gate")

    def copy_in(self, addresses, pages, *, after, each_layer):
        self.entered.set()
        assert self.gate.wait(10)
        return super().copy_in(addresses, pages, after=after, each_layer=each_layer)


def test_blocks_that_wait_for_the_gpu_reach_no_page_after_a_cancel(tmp_path):
    """One disk has read them, and they stand behind another disk's blocks when their load is given up."""
    pages = GatedDisks(num_pages=64, num_layers=LAYERS, run_bytes=4096)
    pages.entered, pages.gate = threading.Event(), threading.Event()
    with TieredKVCache(pages, disks=[disk(tmp_path / name) for name in "ab"]) as cache:
        prompt = keys("p", 6)
        put(cache, prompt)
        on_disk = {tier: [key] for key, tier in zip(prompt, cache.tiers_of(prompt))}
        first = cache.load(on_disk[0], [0])
        assert pages.entered.wait(10)
        second = cache.load(on_disk[1], [1])
        until = time.perf_counter() + 5
        while cache._porter._parcels.empty():
            assert time.perf_counter() < until
            time.sleep(0.001)
        second.cancel()
        pages.pages[1] = 0xDD  # it is somebody else's
        pages.gate.set()
        assert first.wait() == 1
        assert cache.load(on_disk[1], [2]).wait() == 1
        check(pages, on_disk[0], [0]), check(pages, on_disk[1], [2])
        assert (pages.pages[1] == 0xDD).all()


class GatedHost(HostPages):
    """Copies of host memory's blocks wait for a gate, or fail."""

    __slots__ = ("entered", "gate", "fails", "threads")

    def copy_layers(self, addresses, pages, *, after):
        self.threads.append(threading.current_thread())
        self.entered.set()
        assert self.gate.wait(10)
        if self.fails:
            raise RuntimeError("the GPU has fallen off the bus")
        yield from super().copy_layers(addresses, pages, after=after)


def gated():
    pages = GatedHost(num_pages=64, num_layers=LAYERS, run_bytes=4096)
    pages.entered, pages.gate, pages.fails, pages.threads = threading.Event(), threading.Event(), False, []
    return pages


def test_load_returns_while_host_memory_beside_disks_is_still_asked_for(tmp_path):
    with TieredKVCache(gated(), host=[host(8)], disks=[disk(tmp_path / "a")]) as cache:
        prompt = keys("p", 12)
        put(cache, prompt)
        handle = cache.load(prompt, np.arange(12))
        assert cache.device.entered.wait(10)
        cancelled = threading.Thread(target=handle.cancel)
        cancelled.start()
        cancelled.join(0.05)
        assert cancelled.is_alive()  # something may still be written
        cache.device.gate.set()
        cancelled.join(10)
        assert not cancelled.is_alive()
        assert got(cache, prompt) == 12 and threading.current_thread() not in cache.device.threads


def test_host_memory_that_does_not_arrive_ends_the_load(tmp_path):
    with TieredKVCache(gated(), host=[host(8)], disks=[disk(tmp_path / "a")]) as cache:
        prompt = keys("p", 12)
        put(cache, prompt)
        cache.device.gate.set()
        cache.device.fails = True
        handle = cache.load(prompt, np.arange(12))
        assert handle.wait_layer(0) == cache.tiers_of(prompt).index(0)
        cache.device.fails = False
        assert got(cache, prompt) == 12


def test_no_room_while_loading(tmp_path):
    """Every slot is being read: a store finds no room, keeps nothing and breaks nothing."""
    gate = threading.Event()

    def slow(request, count):
        if not request.write:
            gate.wait(5.0)
        return None

    with TieredKVCache(device(), disks=[disk(tmp_path / "a", 6, reader=lambda d, b: FaultyReader(slow, d))]) as cache:
        prompt = keys("busy", 6)
        put(cache, prompt)
        handle = cache.load(prompt, np.arange(6))
        other = keys("other", 4)
        compute(cache.device, other, range(10, 14))
        assert cache.store(other, np.arange(10, 14)).blocks == 0
        gate.set()
        assert handle.wait() == 6
        check(cache.device, prompt, range(6))
        assert got(cache, other) == 0 and got(cache, prompt) == 6


def test_stores_and_loads_at_once(tmp_path):
    """Threads that store and load prompts of their own and shared ones, over tiers too small for all."""
    stores = {"host": [host(10)], "disks": [disk(tmp_path / "a", 10), disk(tmp_path / "b", 10)]}
    cache = TieredKVCache(device(64), **stores)
    wrong = []

    def client(seat):
        rng = np.random.default_rng(seat)
        pages = np.arange(seat * 16, seat * 16 + 8)
        for _ in range(25):
            prompt = keys(str(rng.integers(6)), int(rng.integers(1, 9)))
            own = pages[: len(prompt)]
            handle = cache.load(prompt, own)
            valid = handle.wait_layer(LAYERS - 1)
            handle.wait()
            for key, page in zip(prompt[:valid], own):
                if (cache.device.pages[page] != content(key)).any():
                    wrong.append(key)
            compute(cache.device, prompt[valid:], own[valid:])
            cache.store(prompt, own).wait_copied()

    threads = [threading.Thread(target=client, args=(seat,)) for seat in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    cache.close()
    assert not wrong
    cache._pool.check()
    assert cache.stats()["hits"] > 0 and cache.stats()["quarantined"] == 0


def test_refusals(tmp_path):
    cache = TieredKVCache(device(8), host=[host(4)])
    for call, said in (
        (lambda: cache.store([b"a"], [1, 2]), "pages"), (lambda: cache.load([b"a"], [8]), "pages"),
        (lambda: cache.load(["a"], [0]), "key"), (lambda: cache.load([b"a", b"a"], [0]), "keys"),
        (lambda: cache.store([b"x" * 33], [0]), "key"), (lambda: cache.load([b"a"], [0]).wait_layer(9), "layer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()
    cache.close()
    cache.close()
    with pytest.raises(ValueError, match="open"):
        cache.store([b"a"], [0])
    with pytest.raises(ValueError, match="host"):
        TieredKVCache(device(8), host=[disk(tmp_path / "a")])
    with pytest.raises(ValueError, match="locked"), DiskFilesOpen(tmp_path / "b"):
        TieredKVCache(device(8), disks=[disk(tmp_path / "b")])
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ValueError, match="directory"):
        TieredKVCache(device(8), disks=[disk(tmp_path / "c")])


class DiskFilesOpen:
    def __init__(self, path):
        self.files = DiskFiles(path, block_bytes=BLOCK_BYTES, slots=2)

    def __enter__(self):
        return self.files

    def __exit__(self, *_):
        self.files.close()


def test_a_disk_without_room_is_refused_before_anything_is_stored(tmp_path):
    room = os.statvfs(tmp_path)
    too_many = room.f_bavail * room.f_frsize // BLOCK_BYTES + 10**6
    with pytest.raises(ValueError, match="directory"):
        DiskFiles(tmp_path / "full", block_bytes=BLOCK_BYTES, slots=too_many)
    DiskFiles(tmp_path / "full", block_bytes=BLOCK_BYTES, slots=2).close()
