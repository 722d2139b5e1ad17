"""What a closed pool has left to the next: blocks of host memory on disks, as far as time, room and faults allow, and in
which order they were used."""
import gc
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from pool_cases import BLOCK_BYTES, EIO, ENOSPC, FaultyReader, device, disk, ends, got, host, keys, put

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.blocks.block_index import READY

STALL_S, SLACK_S = 0.15, 2.0  # of a disk that is given up, and of a machine that is busy with other tests


def branch(name: int, length: int) -> list[bytes]:
    """Prompts whose first three blocks are those of every second other one."""
    head = keys(f"head {name % 2}", 3)
    return [*head, *keys(f"branch {name}", 9)][:length]


class Machine(RuleBasedStateMachine):
    """Prompts are stored, loaded, held and forgotten, disks fail; the cache closes and opens again and again."""

    @initialize(hosts=st.integers(0, 8), slots=st.lists(st.integers(1, 20), min_size=1, max_size=2), rate=st.sampled_from([1e9, 5e9]))
    def begin(self, hosts, slots, rate):
        self.folder = Path(tempfile.mkdtemp())
        self.hosts, self.slots, self.rate = hosts, slots, rate
        gc.collect()
        self.left = len(os.listdir("/proc/self/fd")), threading.active_count()
        self.fault: object = None
        self.hit = False  # whether a fault has come since the cache was opened
        self.cache = None
        self.open(60.0)

    def open(self, flush_s):
        def rule(request, count):
            if self.fault is None or self.fault == "write" and not request.write:
                return None
            self.hit = True
            return EIO if self.fault == "write" else self.fault

        stores = [disk(self.folder / f"d{at}", count, stall_s=STALL_S, reader=lambda depth, buffers: FaultyReader(rule, depth))
                  for at, count in enumerate(self.slots)]  # fmt: skip
        hosts = [host(self.hosts, rate=self.rate)] if self.hosts else []
        self.flush_s, self.fault, self.hit = flush_s, None, False
        self.cache = TieredKVCache(device(), host=hosts, disks=stores, flush_s=flush_s)

    @rule(name=st.integers(0, 5), length=st.integers(1, 12))
    def store(self, name, length):
        put(self.cache, branch(name, length))

    @rule(name=st.integers(0, 5), length=st.integers(1, 12))
    def load(self, name, length):
        found = got(self.cache, branch(name, length))  # each of them right
        assert self.hit or found == self.cache.lookup(branch(name, length))

    @rule(name=st.integers(0, 5), length=st.integers(1, 12))
    def forget(self, name, length):
        self.cache.free(branch(name, length))

    @rule(name=st.integers(0, 5), length=st.integers(1, 12), now=st.integers(0, 3))
    def hold(self, name, length, now):
        self.cache.expire(float(now))
        self.cache.hold(branch(name, length), now + 1.0)

    @precondition(lambda self: self.fault is None)
    @rule(fault=st.sampled_from(["write", EIO, ENOSPC, 100, "flip", "stall"]))
    def break_disks(self, fault):
        self.fault = fault

    @rule()
    def mend_disks(self):
        self.fault = None

    @rule(next_s=st.sampled_from([0.0, 60.0, 1e-4]))
    def reopen(self, next_s):
        cache, pool, index = self.cache, self.cache._pool, self.cache._pool.index
        cache._waiter.submit(int).result()  # the pool is told of loads and stores that have ended
        cache.expire(float("inf"))
        prompts = [branch(name, 12) for name in range(6)]
        before = [cache.lookup(keys) for keys in prompts]
        entries = {key: index.get(key) for key in index.keys()}
        assert all(entry.state == READY for entry in entries.values())
        on_disk = {key for key, entry in entries.items() if pool.tiers[entry.place.tier].is_lasting}
        last = sorted(entries, key=lambda key: -entries[key].used)[: sum(self.slots)]
        kept = {0.0: on_disk, 60.0: set(last)}.get(self.flush_s, set())  # at least, where nothing fails
        began = time.perf_counter()
        ends(cache.close)
        took = time.perf_counter() - began
        assert took < min(self.flush_s, 1.0) + STALL_S + SLACK_S, "close() passed its bound"
        pool.check()
        found = cache.flush.found
        if found is not None:
            assert found.kept + found.left == len(entries) - len(on_disk)
        is_whole = not self.hit
        self.open(next_s)
        for keys_of, had in zip(prompts, before):
            wanted = next((at for at, key in enumerate(keys_of[:had]) if key not in kept), had)
            loaded = got(self.cache, keys_of)  # and each of them right, whatever has failed
            assert not is_whole or loaded >= wanted

    def teardown(self):
        if getattr(self, "cache", None) is not None:
            ends(self.cache.close)
            self.cache = None
            gc.collect()
            until = time.monotonic() + 5.0
            while threading.active_count() > self.left[1] and time.monotonic() < until:
                time.sleep(0.01)
            assert threading.active_count() <= self.left[1], "threads are left"
            # A reader that stalled for good keeps the file that it may still write to.
            assert len(os.listdir("/proc/self/fd")) <= self.left[0] + 60, "file handles are left open"
            shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=6, stateful_step_count=15, deadline=None)


@pytest.mark.slow
class TestMachineForLong(Machine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def tiers(path, *, hosts=40, slots=60, **options):
    return {"host": [host(hosts, rate=9e9)], "disks": [disk(path / "a", slots, **options)]}


def test_a_restart_loads_what_it_had_and_nothing_without(tmp_path):
    """Of 20 blocks the disk has 2, and not the first."""
    prompt = keys("p", 20)
    for flush_s, wanted in ((0.0, 0), (30.0, 20)):
        place = tmp_path / str(flush_s)
        with TieredKVCache(device(), **tiers(place), flush_s=flush_s) as cache:
            put(cache, prompt)
            assert cache.tiers_of(prompt).count(1) == 2 and got(cache, prompt) == 20
        assert (cache.flush.found is None) == (not flush_s)
        if flush_s:
            assert (cache.flush.found.kept, cache.flush.found.left) == (18, 0)
        cache.close()  # again, which changes nothing
        with TieredKVCache(device(), **tiers(place)) as cache:
            assert got(cache, prompt) == wanted


def test_what_was_used_last_is_kept_where_disks_are_full(tmp_path):
    with TieredKVCache(device(), **tiers(tmp_path, hosts=30, slots=10), flush_s=30.0) as cache:
        for name in "abc":
            put(cache, keys(name, 10))
        assert got(cache, keys("b", 10)) == 10
    with TieredKVCache(device(), **tiers(tmp_path, hosts=30, slots=10)) as cache:
        assert [got(cache, keys(name, 10)) for name in "abc"] == [0, 10, 0]


def test_the_order_of_use_outlives_a_restart_and_beginnings_go_last(tmp_path):
    """Else the slots' order says what goes first, and that is a prompt's beginning."""
    for changed in (False, True):
        with TieredKVCache(device(), disks=[disk(tmp_path / str(changed), 20)]) as cache:
            put(cache, keys("old", 10))
            put(cache, keys("new", 10))
            assert got(cache, keys("old", 10)) == 10  # used last
        used = tmp_path / str(changed) / "used"
        if changed:
            used.write_bytes(os.urandom(77))
        with TieredKVCache(device(), disks=[disk(tmp_path / str(changed), 20)]) as cache:
            assert not used.exists()  # a process that is killed leaves none that holds no longer
            put(cache, keys("more", 4))
            cache._pool.check()
            left = [got(cache, keys(name, 10)) for name in ("old", "new")]
            assert changed or left == [10, 6]


@pytest.mark.parametrize("fault", ["stall", EIO])
def test_close_ends_within_its_bound_where_disks_fail(tmp_path, fault):
    bad = {"on": False}
    rule = lambda request, count: fault if bad["on"] and request.write else None  # noqa: E731
    stores = tiers(tmp_path, stall_s=0.3, reader=lambda depth, buffers: FaultyReader(rule, depth))
    cache = TieredKVCache(device(), **stores, flush_s=60.0)
    put(cache, keys("p", 20))
    bad["on"] = True
    began = time.perf_counter()
    ends(cache.close)
    assert time.perf_counter() - began < 0.3 + SLACK_S
    assert (cache.flush.found.kept, cache.flush.found.left) == (0, 18)
    with TieredKVCache(device(), **tiers(tmp_path)) as cache:
        assert cache.stats()["blocks"] == 2 and got(cache, keys("p", 20)) == 0


def test_a_slow_disk_is_left_when_time_is_over_with_beginnings_whole(tmp_path):
    """20 ms a write, one at a time: in a quarter of a second it has a dozen, those of what was used last."""
    def slow(request, count):
        if request.write and bad["on"]:
            time.sleep(0.02)

    bad, prompts = {"on": False}, [keys(name, 18) for name in ("first", "last")]
    stores = tiers(tmp_path, stall_s=5.0, bytes_under_way=1, reader=lambda depth, buffers: FaultyReader(slow, depth))
    cache = TieredKVCache(device(), **stores, flush_s=0.25)
    for prompt in prompts:
        put(cache, prompt)
    bad["on"] = True
    began = time.perf_counter()
    ends(cache.close)
    assert 0.2 < time.perf_counter() - began < 0.25 + 0.1 + SLACK_S
    found = cache.flush.found
    assert 0 < found.kept < 32 and found.kept + found.left == 32
    with TieredKVCache(device(), **tiers(tmp_path)) as cache:
        assert got(cache, prompts[1]) >= min(18, found.kept)
        assert got(cache, prompts[0]) <= max(0, found.kept - 10)


def test_a_flush_that_is_interrupted_is_not_begun_again(tmp_path, monkeypatch):
    cache = TieredKVCache(device(), **tiers(tmp_path), flush_s=60.0)
    put(cache, keys("p", 20))
    wait_for = cache.flush._changed.wait_for

    def interrupted(*_):
        raise KeyboardInterrupt

    cache.flush._changed.wait_for = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache.close()
    cache.flush._changed.wait_for = wait_for
    ends(cache.close)
    assert cache.flush.found is None
    with TieredKVCache(device(), **tiers(tmp_path)) as cache:
        assert got(cache, keys("p", 20)) <= cache.stats()["blocks"] <= 20


def test_blocks_that_a_store_still_copies_and_a_load_still_reads_are_kept(tmp_path):
    """close() right behind both."""
    class Slow(HostPages):
        __slots__ = ()

        def copy_out(self, pages, addresses, *, after):
            time.sleep(0.05)
            return super().copy_out(pages, addresses, after=after)

    pages = Slow(num_pages=64, num_layers=3, run_bytes=BLOCK_BYTES // 3)
    cache, prompt = TieredKVCache(pages, **tiers(tmp_path), flush_s=60.0), keys("p", 20)
    put(cache, prompt)
    more = [*prompt, *keys("more", 5)]
    put(cache, more[:22])
    handle = cache.load(more[:22], np.arange(22))
    ends(cache.close)
    assert handle.wait() == 22
    with TieredKVCache(device(), **tiers(tmp_path)) as cache:
        assert got(cache, more) == 22


def test_what_is_no_time_is_refused_before_anything_is_opened(tmp_path):
    for seconds in (-1, float("nan"), "5", None):
        with pytest.raises(ValueError, match="flush_s: expected seconds >= 0"):
            TieredKVCache(device(), disks=[disk(tmp_path / "a")], flush_s=seconds)
    assert not (tmp_path / "a").exists()
    with TieredKVCache(device(), **tiers(tmp_path), flush_s=float("inf")) as cache:
        put(cache, keys("p", 20))
    assert cache.flush.found.left == 0


def test_a_cache_that_cannot_be_opened_leaves_the_order_of_others(tmp_path):
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", 20)]) as cache:
        put(cache, keys("old", 10))
    before = (tmp_path / "a" / "used").read_bytes()
    (tmp_path / "b").write_text("no directory")
    with pytest.raises(ValueError, match="directory"):
        TieredKVCache(device(), disks=[disk(tmp_path / "a", 20), disk(tmp_path / "b", 20)])
    assert (tmp_path / "a" / "used").read_bytes() == before
