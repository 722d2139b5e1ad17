"""Every wait ends, whatever the GPU, a disk or the threads between them do, and nobody is blamed for another's fault."""
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from lane_pages import LanePages
from paths import ROOT
from pool_cases import (
    LAYERS,
    LONG_S,
    SLOT,
    FaultyReader,
    device,
    disk,
    ends,
    got,
    host,
    keys,
    put,
)  # fmt: skip

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.disks.disk_reads import ThreadReader
from gpu.cache.tiers.tiered_cache import MOST_FAULTS, TieredKVCache

pytestmark = pytest.mark.usefixtures("who_asks")


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
