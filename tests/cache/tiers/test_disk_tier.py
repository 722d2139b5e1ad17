"""One disk's thread: how much it has under way while it works, in how large parts it hands over, how often it wakes."""
import os
import threading
import time

import numpy as np
from pool_cases import BLOCK_BYTES, compute, device, disk, keys

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.disks.disk_files import DiskFiles
from gpu.cache.tiers.disks.disk_jobs import DiskCounts, ReadJob, WriteJob
from gpu.cache.tiers.disks.disk_reads import Done, LimitedReader, Request
from gpu.cache.tiers.disks.disk_requests import OBSERVED_BYTES, DiskRequests
from gpu.cache.tiers.host_arena import HostArena, view
from gpu.cache.tiers.tiered_cache import TieredKVCache

SLOT, DEPTH, BLOCKS = 4096 + BLOCK_BYTES, 64, 400


class PromptReader:
    """Has done everything when it is asked to, and tells of as many as are waited for."""

    name = "prompt"

    def __init__(self):
        self.waiting, self.most, self.least, self.polls = [], 0, DEPTH, 0

    def submit(self, requests: list[Request]):
        for one in requests:
            call = os.pwritev if one.write else os.preadv
            self.waiting.append(Done(one.tag, call(one.fd, [view(one.address, one.num_bytes)], one.offset)))
        self.most = max(self.most, len(self.waiting))

    def poll(self, wait_s, few=1):
        self.polls += bool(self.waiting and wait_s)
        told, self.waiting = self.waiting[:few], self.waiting[few:]
        self.least = min(self.least, len(self.waiting))
        return told

    def close(self):
        pass


class Counted(HostPages):
    """Counts hand-overs."""

    __slots__ = ("parts",)

    def copy_in(self, addresses, pages, *, after, each_layer):
        self.parts.append(len(pages))
        return super().copy_in(addresses, pages, after=after, each_layer=each_layer)


def test_a_disk_keeps_seven_eighths_under_way_and_hands_over_quarters(tmp_path):
    pages = Counted(num_pages=BLOCKS, num_layers=3, run_bytes=4096)
    pages.parts = []
    made = []

    def make(depth, buffers):
        made.append(PromptReader())
        return made[-1]

    store = disk(tmp_path / "a", BLOCKS, reader=make, bytes_under_way=DEPTH * SLOT, ring_bytes=3 * DEPTH * SLOT)
    with TieredKVCache(pages, disks=[store]) as cache:
        prompt = keys("p", BLOCKS)
        compute(pages, prompt, range(BLOCKS))
        cache.store(prompt, np.arange(BLOCKS)).wait()
        wanted = pages.pages.copy()
        pages.pages[:] = 0
        made[0].most, made[0].polls = 0, 0
        seen = []
        poll = made[0].poll

        def watched(wait_s, few=1):
            told = poll(wait_s, few)
            seen.append(len(made[0].waiting))
            return told

        made[0].poll = watched
        handle = cache.load(prompt, np.arange(BLOCKS))
        assert handle.wait() == BLOCKS and (pages.pages == wanted).all()
    assert made[0].most == DEPTH
    while_there_is_more = seen[: (BLOCKS - DEPTH) // (DEPTH // 8)]
    assert min(while_there_is_more) >= DEPTH - DEPTH // 8
    assert max(pages.parts[:4]) >= DEPTH // 4 and len(pages.parts) <= BLOCKS // (DEPTH // 4) + 12


def test_a_limiter_waits_once_for_all_that_it_is_asked_for(tmp_path):
    inner = PromptReader()
    limited = LimitedReader(inner, 1e6)
    path = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(path, bytes(40_000), 0)
    pages = device(4).pages
    began = time.perf_counter()
    limited.submit([Request(tag, path, 0, pages.ctypes.data, 4000) for tag in range(10)])
    assert [done.tag for done in limited.poll(5.0, 5)] == list(range(5))
    assert 0.019 < time.perf_counter() - began and inner.polls <= 2  # 4 ms each
    assert [done.tag for done in limited.poll(5.0, 5)] == list(range(5, 10))
    assert 0.039 < time.perf_counter() - began and inner.polls <= 4 and limited.poll(5.0) == []
    os.close(path)


class Slow(Counted):
    """Its first hand-over takes until the gate opens."""

    __slots__ = ("entered", "gate")

    def copy_in(self, addresses, pages, *, after, each_layer):
        self.entered.set()
        assert self.gate.wait(10)
        return super().copy_in(addresses, pages, after=after, each_layer=each_layer)


def test_disks_read_on_while_the_gpu_takes_long(tmp_path):
    """Two disks fill their rings meanwhile, and all of that goes in one more call."""
    pages = Slow(num_pages=BLOCKS, num_layers=3, run_bytes=4096)
    pages.parts, pages.entered, pages.gate = [], threading.Event(), threading.Event()
    stores = [disk(tmp_path / name, BLOCKS, bytes_under_way=DEPTH * SLOT, ring_bytes=3 * DEPTH * SLOT) for name in "ab"]
    with TieredKVCache(pages, disks=stores) as cache:
        prompt = keys("p", BLOCKS)
        compute(pages, prompt, range(BLOCKS))
        cache.store(prompt, np.arange(BLOCKS)).wait()
        wanted = pages.pages.copy()
        pages.pages[:] = 0
        handle = cache.load(prompt, np.arange(BLOCKS))
        assert pages.entered.wait(10)
        rings, until = {"a": 0, "b": 0}, time.monotonic() + 10
        while min(rings.values()) < 2 * DEPTH and time.monotonic() < until:
            time.sleep(0.01)
            rings = {one.files.directory.name: 3 * DEPTH - len(one._free) for one in cache._disks}
        assert min(rings.values()) >= 2 * DEPTH, "a disk waited for the other one's hand-over"
        pages.gate.set()
        assert handle.wait() == BLOCKS and (pages.pages == wanted).all()
        assert max(pages.parts) > 2 * DEPTH
        stats = cache.stats()
    for name in "ab":
        told = stats[name]
        assert told["porter_s"] > 0 and told["copies_s"] >= 0 and told["wall_s"]["check"] >= told["cpu_s"]["check"] * 0.5
        assert set(told["wall_s"]) == {"idle", "ask", "read", "slots", "check", "hand over", "end", "drain"}


def test_the_rate_of_reads_is_of_the_time_in_which_they_were_read(tmp_path):
    """Writes are under way when a disk is read again after it had nothing to do: their time, and the pause before, are
    none of the reads', or the disk would look slower than it is and get fewer blocks."""
    files = DiskFiles(tmp_path / "a", block_bytes=BLOCK_BYTES, slots=8)
    ring, reader, told = HostArena(slots=4, slot_bytes=files.slot_bytes), PromptReader(), []
    requests = DiskRequests(files, reader, ring, DiskCounts(), stall_s=5.0, observe=lambda *seen: told.append(seen),
                            stalled=None)  # fmt: skip
    requests.write([requests.begin_write(WriteJob(0, b"w", 0, None, lambda jobs, fault: None), 0)])
    time.sleep(0.2)
    began = time.perf_counter()
    requests.read([ReadJob(1, b"r", 0, None, lambda jobs, fault: None)], [1])
    requests.observe(OBSERVED_BYTES)
    took = time.perf_counter() - began
    assert [num_bytes for num_bytes, _ in told] == [OBSERVED_BYTES] and told[0][1] <= took
    time.sleep(0.1)
    requests.read([ReadJob(2, b"s", 0, None, lambda jobs, fault: None)], [2])  # the first is still under way
    requests.observe(OBSERVED_BYTES)
    assert told[1][1] >= 0.1
    while requests.under_way:
        requests.poll(0.0, 3)
    time.sleep(0.1)
    requests.write([requests.begin_write(WriteJob(3, b"w", 0, None, lambda jobs, fault: None), 3)])
    requests.read([ReadJob(1, b"r", 0, None, lambda jobs, fault: None)], [1])
    requests.observe(OBSERVED_BYTES)
    assert told[2][1] < 0.1
    requests.close()
    files.close()
    ring.close()
