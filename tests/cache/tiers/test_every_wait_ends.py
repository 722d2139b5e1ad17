"""Every wait ends, whatever the GPU, a disk or the threads between them do, and nobody is blamed for another's fault."""
import contextlib
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from lane_pages import LanePages
from paths import ROOT
from pool_cases import (
    BLOCK_BYTES,
    EIO,
    LAYERS,
    FaultyReader,
    check,
    compute,
    device,
    disk,
    got,
    host,
    keys,
    put,
)  # fmt: skip

from gpu.cache.tiers import disk_jobs, disk_tier, handles, tiered_cache
from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.disk_reads import ThreadReader
from gpu.cache.tiers.tiered_cache import MOST_FAULTS, TieredKVCache

SLOT = 4096 + BLOCK_BYTES
LONG_S = 20.0  # after which something counts as never ending


def ends(call):
    """What the call returns; AssertionError where it does not end."""
    out = []
    thread = threading.Thread(target=lambda: out.append(call()), daemon=True)
    thread.start()
    thread.join(LONG_S)
    assert not thread.is_alive(), "it does not end"
    return out[0]


@contextlib.contextmanager
def opened(pages, **stores):
    """A cache whose close() must end."""
    cache = TieredKVCache(pages, **stores)
    try:
        yield cache
    finally:
        ends(cache.close)
        if isinstance(pages, LanePages):
            pages.close()


def failing(*names):
    return lambda name: RuntimeError("the GPU has fallen off the bus") if name in names else None


@pytest.mark.parametrize("names", [("copy",), ("out",), ("copy", "in", "out")])
def test_a_store_ends_whose_copies_fail(tmp_path, names):
    with opened(LanePages(16), host=[host(8)], disks=[disk(tmp_path / "a")]) as cache:
        prompt = keys("p", 12)
        cache.device.fault = failing(*names)
        store = cache.store(prompt, np.arange(12))
        ends(store.wait_copied), ends(store.wait)
        stats = cache.stats()
        assert stats["blocks"] == stats["quarantined"] == stats["a"]["faults"] == 0
        assert "bus" in stats["last_device_fault"] and "bus" in stats["a"]["last_fault"]
        cache.device.fault = failing()
        put(cache, prompt)
        assert got(cache, prompt) == 12


def test_a_load_ends_whose_copies_fail_later(tmp_path):
    """Its tickets raise from then on whoever asks them: the disk's thread goes on, and the blocks may go again."""
    with opened(LanePages(16), host=[host(4)], disks=[disk(tmp_path / "a")]) as cache:
        prompt = keys("p", 12)
        put(cache, prompt)
        cache.device.fault = failing("copy")
        with pytest.raises(RuntimeError, match="bus"):
            load = cache.load(prompt, np.arange(12))
            load.wait()
        ends(load.cancel)
        cache.device.fault = failing()
        assert ends(lambda: got(cache, prompt)) == 12 and not cache.stats()["a"]["stalled"]
        cache._waiter.submit(int).result(LONG_S)
        cache.free(prompt)
        assert cache.stats()["blocks"] == 0


def test_nothing_writes_to_the_pages_after_a_wait_that_raised():
    """The first layer's copy fails while the others' are still to come: pages that serve another prompt by then would
    have this one's layers, and be stored so."""
    with opened(LanePages(16), host=[host(4)]) as cache:
        prompt = keys("p", 4)
        put(cache, prompt)
        gate, first = threading.Event(), iter([RuntimeError("the GPU has fallen off the bus")])

        def fault(name):
            if name != "copy":
                return None
            error = next(first, None)
            if error is None:
                gate.wait(LONG_S)
            return error

        cache.device.fault = fault
        load, raised = cache.load(prompt, np.arange(4)), []

        def wait():
            with pytest.raises(RuntimeError, match="bus"):
                load.wait()
            raised.append(not gate.is_set())

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(0.1)
        gate.set()
        waiting.join(LONG_S)
        assert raised == [False]


@pytest.mark.parametrize("stores", ["host", "disk"])
def test_copies_that_the_gpu_has_no_memory_for_cost_hits_and_no_disk(tmp_path, stores):
    """More of them than faults of a disk that is given up: what is stored stays, and is loaded when there is memory."""
    blocks = MOST_FAULTS + 6
    options = {"host": [host(blocks)]} if stores == "host" else {"disks": [disk(tmp_path / "a", blocks)]}
    with opened(LanePages(blocks), **options) as cache:
        prompt = keys("p", blocks)
        cache.device.fault = failing("out")
        ends(cache.store(prompt, np.arange(blocks)).wait)
        cache.device.fault = failing("in")
        put(cache, prompt)
        assert got(cache, prompt) == 0
        cache.device.fault = failing()
        assert got(cache, prompt) == blocks


class SlowOut(HostPages):
    """Pages whose KV is computed only some time after a store was asked for."""

    __slots__ = ("seconds",)

    def copy_out(self, pages, addresses, *, after):
        time.sleep(self.seconds)
        return super().copy_out(pages, addresses, after=after)


def test_a_disk_that_waits_for_the_gpu_has_not_stalled(tmp_path):
    """Loads and stores in its queue, and the stores' pages are computed for longer than a request may take."""
    pages = SlowOut(num_pages=64, num_layers=LAYERS, run_bytes=4096)
    pages.seconds = 0.0
    late = lambda request, count: time.sleep(0.02) if not request.write else None  # noqa: E731
    reader = lambda depth, buffers: FaultyReader(late, depth)  # noqa: E731
    with opened(pages, disks=[disk(tmp_path / "a", 60, reader=reader, stall_s=0.25, bytes_under_way=4 * SLOT)]) as cache:
        prompt, other = keys("p", 6), keys("o", 3)
        put(cache, prompt)
        pages.seconds = 0.4
        load = cache.load(prompt, np.arange(6))
        store = cache.store(other, 10 + np.arange(3))
        assert ends(load.wait) == 6
        ends(store.wait)
        assert not cache.stats()["a"]["stalled"] and cache.lookup(other) == 3


class Stuck(ThreadReader):
    """A pool of threads that begin none of their requests before the gate opens."""

    def __init__(self, threads):
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        super().__init__(threads=threads)

    def _work(self):
        self.gate.wait(LONG_S)
        super()._work()
        self.begun.release()


def test_writes_that_begin_after_the_end_meet_no_other_file(tmp_path):
    """Their file's number would be that of whatever is opened next."""
    made = []

    def make(depth, buffers):
        made.append(Stuck(2))
        return made[-1]

    with opened(device(), disks=[disk(tmp_path / "a", reader=make, stall_s=0.1)]) as cache:
        put(cache, keys("p", 6))
        number = cache._disks[0].files.fd
    others = [os.open(tmp_path / str(at), os.O_RDWR | os.O_CREAT) for at in range(4)]
    made[0].gate.set()
    assert all(made[0].begun.acquire(timeout=LONG_S) for _ in range(2))
    assert not any((tmp_path / str(at)).stat().st_size for at in range(4))
    for fd in {*others, number}:
        os.close(fd)


def test_a_reader_that_fails_ends_what_is_queued(tmp_path):
    class Failing(FaultyReader):
        fails = False

        def submit(self, requests):
            if self.fails:
                raise OSError(28, "no room")
            super().submit(requests)

    made = []

    def make(depth, buffers):
        made.append(Failing(lambda request, count: None, depth))
        return made[-1]

    with opened(LanePages(16), disks=[disk(tmp_path / "a", reader=make)]) as cache:
        put(cache, keys("p", 6))
        made[0].fails = True
        stores = [cache.store(keys(name, 6), np.arange(6, 12)) for name in "qrs"]
        load = cache.load(keys("p", 6), np.arange(6))
        assert ends(load.wait) < 6 or not cache.stats()["a"]["stalled"]
        for store in stores:
            ends(store.wait)
        assert cache.stats()["a"]["stalled"] and cache.stats()["quarantined"] == 0


def test_a_block_is_freed_once(tmp_path):
    with opened(device(), host=[host(4)]) as cache:
        put(cache, keys("p", 2))
        cache.free(keys("p", 2) * 2)
        cache._pool.check()
        assert cache.stats()["blocks"] == 0


SERVED_ON = """
    import sys, threading
    from pathlib import Path
    from pool_cases import *
    def serve():
        threading.main_thread().join()
        with TieredKVCache(device(), host=[host(4)], disks=[disk(Path(sys.argv[1]))]) as cache:
            for name in "pqp":
                put(cache, keys(name, 8))
                print(got(cache, keys(name, 8)), flush=True)
    threading.Thread(target=serve).start()
"""


def test_threads_may_go_on_when_the_main_thread_has_ended(tmp_path):
    """A server whose main thread only starts others: Python's pools of threads take no tasks from then on."""
    places = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "support")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SERVED_ON), str(tmp_path / "a")], capture_output=True, text=True,
        timeout=LONG_S, env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (["8", "8", "8"], "")


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

    PAGES, PROMPTS, BLOCKS = 10, 8, 9

    def __init__(self, cache, seed, until):
        self.cache, self.seed, self.until = cache, seed, until
        self.turns = self.hits = self.cancelled = 0
        self.wrong = []

    def run(self, seat):
        rng = random.Random(1000 * self.seed + seat)
        try:
            while time.monotonic() < self.until and not self.wrong:
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
    assert callers.turns > 10 and callers.cancelled and cache.stats()["quarantined"] == 0
    cache.expire(float("inf"))
    cache._pool.check()
    assert sum(map(cache._pool.evictable, range(len(cache._pool.tiers)))) == len(cache._pool), "a block stays taken"
