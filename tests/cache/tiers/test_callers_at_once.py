"""Many callers of one cache at once, with sleeps around every lock and faults of disks and of the GPU."""
import random
import sys
import threading
import time
import types

import numpy as np
import pytest
from lane_pages import LanePages
from pool_cases import EIO, LAYERS, LONG_S, SLOT, FaultyReader, check, compute, disk, ends, host, keys

from gpu.cache.tiers import handles, tiered_cache
from gpu.cache.tiers.disks import disk_jobs, disk_tier
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.blocks.block_sums import block_sums

pytestmark = pytest.mark.usefixtures("who_asks")


def jitters(monkeypatch, rng):
    """Threads sleep now and then on both sides of every lock of the pool's."""

    def pause():
        chance = rng.random()
        if chance < 0.25:
            time.sleep(rng.random() * 0.001 if chance < 0.05 else 0.0)

    class Jittering(threading.Condition):
        def __enter__(self):
            pause()
            return super().__enter__()

        def __exit__(self, *arguments):
            pause()
            super().__exit__(*arguments)
            pause()

    names = {name: getattr(threading, name) for name in threading.__all__}
    shim = types.SimpleNamespace(**names | {"Condition": Jittering, "Lock": Jittering})
    for module in (handles, disk_jobs, disk_tier, tiered_cache):
        monkeypatch.setattr(module, "threading", shim)


class Callers:
    """Threads that load, cancel, compute, store and free prompts that they share, each in pages of its own."""

    PAGES, PROMPTS, BLOCKS, LEAST = 10, 8, 9, 20

    def __init__(self, cache, seed, until):
        self.cache, self.seed, self.until = cache, seed, until
        self.turns = self.hits = self.cancelled = 0
        self.wrong = []

    def run(self, seat):
        rng = random.Random(1000 * self.seed + seat)
        try:
            while (time.monotonic() < self.until or self.turns < self.LEAST) and not self.wrong:
                self.turn(rng, seat * self.PAGES)
        except BaseException as error:
            self.wrong.append(error)

    def turn(self, rng, first):
        cache, kv = self.cache, self.cache.device.pages
        prompt = keys(str(rng.randrange(self.PROMPTS)), rng.randint(1, self.BLOCKS))
        pages = np.array(rng.sample(range(first, first + self.PAGES), len(prompt)), np.int32)
        kv[pages] = 0xEE
        if rng.random() < 0.1:
            cache.free(prompt)
        if rng.random() < 0.1:
            cache.hold(prompt, time.monotonic() + 0.02)
        cache.expire(time.monotonic())
        load, valid = cache.load(prompt, pages), 0
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.002)
            load.cancel()
            kv[pages] = 0xAB
            time.sleep(rng.random() * 0.003)
            assert (kv[pages] == 0xAB).all(), "written after cancel() had returned"
            self.cancelled += 1
        else:
            try:
                load.wait_layer(rng.randrange(LAYERS))
                valid = load.wait()
                check(cache.device, prompt[:valid], pages[:valid])
            except RuntimeError:  # of the GPU
                load.cancel()
        compute(cache.device, prompt[valid:], pages[valid:])
        store = cache.store(prompt, pages)
        store.wait_copied()
        if rng.random() < 0.2:
            store.wait()
        self.turns, self.hits = self.turns + 1, self.hits + valid


@pytest.mark.slow
@pytest.mark.parametrize(("tiers", "slots", "faults", "gpu_faults"), [
    ("host", 2, 0, 0), ("a", 2, 20, 0), ("host ab", 3, 30, 0), ("host a", 2, 40, 0.03), ("host ab", 8, 0, 0.03),
])  # fmt: skip
def test_callers_at_once_with_sleeps_around_every_lock(tmp_path, monkeypatch, tiers, slots, faults, gpu_faults):
    """Tiers and rings too small for what is asked of them, faults of disks and of the GPU: every call ends, no block is
    wrong, nothing is written after a cancel, and nothing stays taken."""
    seed, names, seats = 5, tiers.split()[-1].replace("host", ""), 3
    rng = random.Random(seed)
    jitters(monkeypatch, rng)
    rule = lambda request, count: rng.choice([EIO, 100, 0, "flip"]) if faults and not rng.randrange(faults) else None  # noqa: E731
    options = {"reader": lambda depth, buffers: FaultyReader(rule, depth), "ring_bytes": slots * SLOT}
    pages = LanePages(seats * Callers.PAGES, slow_s=0.003, seed=seed)
    block_sums(np.zeros((1, 16), np.uint8))  # compiled before the clock starts
    pages.fault = lambda name: RuntimeError("of the GPU") if rng.random() < gpu_faults else None
    cache = TieredKVCache(
        pages, host=[host(8)] if "host" in tiers else [], disks=[disk(tmp_path / name, 12, **options) for name in names]
    )
    told = cache._after_copies

    def after_copies(handle):
        assert not any(one._wake._is_owned() for one in cache._disks), "told with a lock of a disk held"
        told(handle)

    monkeypatch.setattr(cache, "_after_copies", after_copies)
    callers = Callers(cache, seed, time.monotonic() + 0.4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=callers.run, args=(seat,), daemon=True) for seat in range(seats)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
            assert not thread.is_alive(), "a call does not end"
        ends(cache.close)
    finally:
        sys.setswitchinterval(interval)
    pages.close()
    assert not callers.wrong, callers.wrong
    assert callers.turns >= callers.LEAST and callers.cancelled and cache.stats()["quarantined"] == 0
    cache.expire(float("inf"))
    cache._pool.check()
    assert sum(map(cache._pool.evictable, range(len(cache._pool.tiers)))) == len(cache._pool), "a block stays taken"
