"""Who may use an open cache, and how it closes: other threads, forked processes, interrupts, and what goes back."""
import os
import threading
import time

import numpy as np
import pytest
from pool_cases import BLOCK_BYTES, LONG_S, check, compute, device, disk, ends, got, host, keys, put

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.tiered_cache import TieredKVCache

pytestmark = pytest.mark.usefixtures("who_asks")

BLOCKS = 6


def test_a_forked_process_is_refused_and_leaves_the_files_to_its_parent(tmp_path):
    """It has none of the threads that would end its loads, may have got locks that nobody lets go, and has the file by
    whose lock the directory is its parent's."""
    cache, prompt = TieredKVCache(device(), host=[host(4)], disks=[disk(tmp_path / "a")]), keys("p", BLOCKS)
    put(cache, prompt)
    calls = {
        "load": lambda: cache.load(prompt, np.arange(BLOCKS)), "store": lambda: cache.store(prompt, np.arange(BLOCKS)),
        "lookup": lambda: cache.lookup(prompt), "free": lambda: cache.free(prompt), "stats": cache.stats,
        "hold": lambda: cache.hold(prompt, 1.0), "expire": lambda: cache.expire(1.0),
        "tiers_of": lambda: cache.tiers_of(prompt),
    }  # fmt: skip
    stay, go = os.pipe()
    told, tell = os.pipe()
    with cache._lock:  # as another thread may hold it at that moment
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(go)
            refused = []
            for name, call in calls.items():
                try:
                    call()
                except ValueError as error:
                    refused += [name] if "forked" in str(error) else []
            cache.close()
            status = int(refused != list(calls))
            os.write(tell, b"x")
            os.read(stay, 1)  # the directory's lock stays open here for as long as its parent likes
        finally:
            os._exit(status)
    try:
        assert ends(lambda: os.read(told, 1)) == b"x"
        assert got(cache, prompt) == BLOCKS
        ends(cache.close)
        with TieredKVCache(device(), disks=[disk(tmp_path / "a")]) as again:
            assert again.stats()["blocks"] > 0
    finally:
        os.close(go)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for fd in (stay, told, tell):
            os.close(fd)


def test_a_close_that_was_interrupted_may_be_called_again(tmp_path, monkeypatch):
    cache, prompt = TieredKVCache(device(), disks=[disk(tmp_path / name) for name in "ab"]), keys("p", BLOCKS)
    put(cache, prompt)
    thread = cache._disks[1]._thread
    join = thread.join

    def interrupted():
        monkeypatch.setattr(thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.close()
    with pytest.raises(ValueError, match="open"):
        cache.load(prompt, np.arange(BLOCKS))
    for _ in range(2):
        ends(cache.close)
    with TieredKVCache(device(), disks=[disk(tmp_path / name) for name in "ab"]) as again:
        assert got(again, prompt) == BLOCKS


class Gated(HostPages):
    """Pages whose copies wait for the gate."""

    __slots__ = ("gate", "begun")

    def copy_in(self, addresses, pages, *, after, each_layer):
        self.begun.set()
        self.gate.wait(LONG_S)
        return super().copy_in(addresses, pages, after=after, each_layer=each_layer)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_close_waits_for_loads_of_other_threads_and_gives_nothing_back_under_them(tmp_path, where):
    pages = Gated(num_pages=16, num_layers=3, run_bytes=BLOCK_BYTES // 3)
    pages.gate, pages.begun = threading.Event(), threading.Event()
    stores = {"host": [host(8)]} if where == "host" else {"disks": [disk(tmp_path / "a")]}
    cache, prompt = TieredKVCache(pages, **stores), keys("p", BLOCKS)
    put(cache, prompt)
    valid = []
    loading = threading.Thread(target=lambda: valid.append(cache.load(prompt, np.arange(BLOCKS)).wait()), daemon=True)
    loading.start()
    assert pages.begun.wait(LONG_S)
    closing = [threading.Thread(target=cache.close, daemon=True) for _ in range(2)]
    for thread in closing:
        thread.start()
    time.sleep(0.05)
    assert all(thread.is_alive() for thread in closing), "closed under a load"
    pages.gate.set()
    for thread in (loading, *closing):
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert valid == [BLOCKS]
    check(pages, prompt, range(BLOCKS))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_closed_arena_gives_its_memory_back_while_somebody_still_has_it():
    num_bytes = 2**26
    before = resident_bytes()
    arena = HostArena(slots=16, slot_bytes=num_bytes // 16)
    assert resident_bytes() > before + num_bytes // 2
    arena.close()
    assert resident_bytes() < before + num_bytes // 2
    assert not any(arena.bytes_of(3)[:100])  # a view that somebody kept is still one of this process's memory


class Unmarked(HostPages):
    """A device that can note no point of the stream, as one without memory for an event."""

    __slots__ = ("failing",)

    def mark(self):
        if self.failing:
            raise RuntimeError("out of memory")


def test_a_call_that_the_gpu_refuses_takes_nothing(tmp_path):
    pages = Unmarked(num_pages=16, num_layers=3, run_bytes=BLOCK_BYTES // 3)
    pages.failing = False
    with TieredKVCache(pages, host=[host(4)], disks=[disk(tmp_path / "a")]) as cache:
        put(cache, keys("p", BLOCKS))
        compute(pages, keys("q", BLOCKS), range(BLOCKS))
        pages.failing = True
        for call in (cache.load, cache.store):
            with pytest.raises(RuntimeError, match="out of memory"):
                call(keys("p" if call == cache.load else "q", BLOCKS), np.arange(BLOCKS))
        pages.failing = False
        put(cache, keys("q", BLOCKS))
        assert got(cache, keys("q", BLOCKS)) == got(cache, keys("p", BLOCKS)) == BLOCKS
        cache._waiter.submit(int).result(LONG_S)
        cache.free([*keys("p", BLOCKS), *keys("q", BLOCKS)])
        assert cache.stats()["blocks"] == 0
