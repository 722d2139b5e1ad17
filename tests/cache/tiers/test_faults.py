"""Faults of disks, processes and devices: each costs hits, none gives wrong KV or a hang."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
from pool_cases import (
    BLOCK_BYTES,
    EIO,
    ENOSPC,
    FaultyReader,
    compute,
    device,
    disk,
    got,
    host,
    keys,
    put,
)  # fmt: skip
from soak_tiers import soak

from gpu.cache.tiers.host_arena import view
from gpu.cache.tiers.tiered_cache import TieredKVCache

pytestmark = pytest.mark.usefixtures("who_asks")

BLOCKS = 10


def reopened(path: Path, spoil) -> int:
    """Hits of a prompt whose files were spoilt while nobody used them."""
    with TieredKVCache(device(), disks=[disk(path)]) as cache:
        put(cache, keys("p", BLOCKS))
    spoil(path)
    with TieredKVCache(device(), disks=[disk(path)]) as cache:
        first = got(cache, keys("p", BLOCKS))
        again = got(cache, keys("p", BLOCKS))
        assert again <= first
        put(cache, keys("p", BLOCKS))  # what is missing is stored again, and all of it is there
        assert got(cache, keys("p", BLOCKS)) == BLOCKS
        cache._pool.check()
    return first


def damage(name: str, change):
    def spoil(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        (path / name).write_bytes(change(content))

    return spoil


def flip(at: int):
    def change(content: bytearray) -> bytearray:
        content[at] ^= 1
        return content

    return change


SLOT = 4096 + BLOCK_BYTES


@pytest.mark.parametrize(("spoil", "hits"), [
    (lambda path: (path / "blocks").unlink(), 0),
    (lambda path: (path / "complete").unlink(), 0),
    (damage("blocks", lambda content: content[: 4 * SLOT]), 4),
    (damage("blocks", lambda content: content[: 4 * SLOT + 5000]), 4),
    (damage("blocks", lambda content: b""), 0),
    (damage("blocks", flip(5 * SLOT + 4096 + 77)), 5),  # KV
    (damage("blocks", flip(5 * SLOT + 20)), 5),  # a header
    (damage("blocks", lambda content: content[SLOT:] + content[:SLOT]), 0),  # blocks where they do not belong
    (damage("complete", flip(3 * 64 + 9)), 3),
    (damage("complete", lambda content: content[: 3 * 64 + 10]), 3),
    (damage("complete", lambda content: os.urandom(len(content))), 0),
    (lambda path: None, BLOCKS),
])  # fmt: skip
def test_damaged_files_cost_hits(tmp_path, spoil, hits):
    assert reopened(tmp_path / "a", spoil) == hits


def test_a_description_that_is_none_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pool.json").write_text("{")
    with pytest.raises(ValueError, match="no description"):
        TieredKVCache(device(), disks=[disk(tmp_path / "a")])


def faulty(rule, made):
    def make(depth, buffers):
        made.append(FaultyReader(rule, depth))
        return made[-1]

    return make


@pytest.mark.parametrize(("what", "said"), [
    (EIO, "EIO"), (100, "short read of 100 bytes"), (0, "short read of 0 bytes"), ("flip", ""),
])
def test_bad_reads_cost_hits(tmp_path, what, said):
    bad = {"on": True}
    prompt = keys("p", BLOCKS)
    rule = lambda request, count: what if bad["on"] and not request.write and request.offset == 6 * SLOT else None  # noqa: E731
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", reader=faulty(rule, []))]) as cache:
        put(cache, prompt)
        assert got(cache, prompt) == 6
        stats = cache.stats()["a"]
        assert stats["faults"] == 1 and stats["last_fault"] and said in stats["last_fault"]
        assert got(cache, prompt) == 6  # it is not asked for again
        bad["on"] = False
        put(cache, prompt)
        assert got(cache, prompt) == BLOCKS


@pytest.mark.parametrize(("what", "said"), [
    (EIO, "EIO"), (ENOSPC, "ENOSPC"), (4096, "short write of 4096 bytes"), ("flip", ""),
])
def test_bad_writes_cost_hits(tmp_path, what, said):
    rule = lambda request, count: what if request.write and request.offset == 6 * SLOT else None  # noqa: E731
    prompt = keys("p", BLOCKS)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", reader=faulty(rule, []))]) as cache:
        put(cache, prompt)
        assert said in cache.stats()["a"]["last_fault"]
        # A flipped bit on its way back leaves the disk's block as it was sealed.
        assert got(cache, prompt) == (BLOCKS if what == "flip" else 6)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")]) as cache:
        assert got(cache, prompt) == (BLOCKS if what == "flip" else 6)


def test_a_file_removed_under_an_open_pool_costs_nothing_until_it_is_closed(tmp_path):
    prompt = keys("p", BLOCKS)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")]) as cache:
        put(cache, prompt)
        (tmp_path / "a" / "blocks").unlink()
        assert got(cache, prompt) == BLOCKS
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")]) as cache:
        assert got(cache, prompt) == 0


def test_a_file_truncated_under_an_open_pool(tmp_path):
    prompt = keys("p", BLOCKS)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")]) as cache:
        put(cache, prompt)
        os.truncate(tmp_path / "a" / "blocks", 4 * SLOT)
        assert got(cache, prompt) == 4


def test_a_disk_that_fails_again_and_again_is_left(tmp_path):
    rule = lambda request, count: EIO  # noqa: E731
    with TieredKVCache(device(), host=[host()], disks=[disk(tmp_path / "a", 200, reader=faulty(rule, []))]) as cache:
        for i in range(8):
            put(cache, keys(f"p{i}", 20))
        assert cache.stats()["a"]["weight_bytes_per_s"] == 0
        put(cache, keys("after", 20))
        assert got(cache, keys("after", 20)) == 20  # all in host memory


def test_a_disk_that_stalls_ends_its_loads_and_keeps_its_buffers(tmp_path):
    """What it delivers long after it was given up reaches nobody's pages, and its buffers serve nobody else before."""
    made = []
    stalling = {"on": False}
    rule = lambda request, count: "stall" if stalling["on"] and not request.write else None  # noqa: E731
    stores = {"host": [host()], "disks": [disk(tmp_path / "a", reader=faulty(rule, made), stall_s=0.15)]}
    with TieredKVCache(device(), **stores) as cache:
        prompt = keys("p", BLOCKS)
        put(cache, prompt)
        stalling["on"] = True
        began = time.perf_counter()
        valid = got(cache, prompt)
        assert valid < BLOCKS and time.perf_counter() - began < 5.0
        assert cache.stats()["a"]["stalled"] and cache.stats()["quarantined"] == 0
        before = cache.device.pages.copy()
        made[0].release()
        time.sleep(0.05)
        assert (cache.device.pages == before).all()
        put(cache, prompt)
        assert got(cache, prompt) == BLOCKS  # without the disk


class TellsOneAtATime(FaultyReader):
    """A reader that tells of one request in each poll, as any may."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._kept = []

    def poll(self, wait_s, few=1):
        self._kept += super().poll(wait_s, few)
        told, self._kept = self._kept[:1], self._kept[1:]
        return told


def test_a_stalled_disk_whose_requests_all_end_at_last_leaves_no_file_open(tmp_path):
    made, stalling = [], {"on": False}
    rule = lambda request, count: "stall" if stalling["on"] and not request.write else None  # noqa: E731

    def reader(depth, buffers):
        made.append(TellsOneAtATime(rule, depth))
        return made[-1]

    handles = len(os.listdir("/proc/self/fd"))
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", reader=reader, stall_s=0.15)]) as cache:
        put(cache, keys("p", BLOCKS))
        stalling["on"] = True
        assert got(cache, keys("p", BLOCKS)) < BLOCKS and cache.stats()["a"]["stalled"]
        assert len(made[0]._stalled) > 1
        made[0].release()
    assert len(os.listdir("/proc/self/fd")) == handles


def test_buffers_of_a_disk_that_never_answers_are_not_given_back(tmp_path, monkeypatch):
    """The kernel may write to them whenever the device comes back, also after the pool was closed."""
    monkeypatch.setattr("gpu.cache.tiers.disks.disk_requests.LATE_S", 0.05)
    made, stalling = [], {"on": False}
    rule = lambda request, count: "stall" if stalling["on"] and not request.write else None  # noqa: E731
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", reader=faulty(rule, made), stall_s=0.15)]) as cache:
        put(cache, keys("p", BLOCKS))
        stalling["on"] = True
        assert got(cache, keys("p", BLOCKS)) < BLOCKS
        ring, (request, *_) = cache._disks[0].ring, made[0]._stalled
        view(request.address, 4)[:] = b"kept"
    assert bytes(view(request.address, 4)) == b"kept" and ring.region[0] <= request.address  # else they read as zeros


def test_writes_that_stall_end_too(tmp_path):
    rule = lambda request, count: "stall" if request.write else None  # noqa: E731
    stores = {"disks": [disk(tmp_path / "a", reader=faulty(rule, []), stall_s=0.15), disk(tmp_path / "b")]}
    with TieredKVCache(device(), **stores) as cache:
        put(cache, keys("p", BLOCKS))
        assert got(cache, keys("p", BLOCKS)) < BLOCKS
        put(cache, keys("q", BLOCKS))
        assert got(cache, keys("q", BLOCKS)) == BLOCKS


class BrokenPages:
    """A device whose copies fail."""

    def __init__(self, pages):
        self._pages, self.broken = pages, False

    def __getattr__(self, name):
        return getattr(self._pages, name)

    def copy_in(self, *arguments, **options):
        if self.broken:
            raise RuntimeError("the GPU has fallen off the bus")
        return self._pages.copy_in(*arguments, **options)


def test_a_device_that_fails_ends_the_load(tmp_path):
    pages = BrokenPages(device())
    with TieredKVCache(pages, disks=[disk(tmp_path / "a")]) as cache:
        prompt = keys("p", BLOCKS)
        compute(pages, prompt, range(BLOCKS))
        cache.store(prompt, np.arange(BLOCKS)).wait()
        pages.broken = True
        assert cache.load(prompt, np.arange(BLOCKS)).wait_layer(0) == 0
        assert "bus" in cache.stats()["a"]["last_fault"]


@pytest.mark.slow
def test_random_faults_soak(tmp_path, soak_requests):
    """The short form of soak_tiers.py; POOL_SOAK says how many requests."""
    found = soak(tmp_path, soak_requests, seed=7, restart_every=150)
    assert found.requests == soak_requests and found.hits > soak_requests and found.cancelled and found.faults
