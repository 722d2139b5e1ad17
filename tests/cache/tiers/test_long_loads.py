"""Loads that a thread of the cache asks for: layers told one by one, errors, cancels, closes and interrupts between them."""
import math
import os
import queue
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_pages import LanePages
from pool_cases import BLOCK_BYTES, LONG_S, RUN_BYTES, check, content, disk, ends, host, keys, put

from gpu.cache.tiers import load_parts
from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.tiered_cache import TieredKVCache

BLOCKS, MANY_LAYERS = 5, 3


@pytest.fixture(autouse=True)
def all_are_long(monkeypatch):
    monkeypatch.setattr(load_parts, "LONG_LOAD_BYTES", 0)


class Stepped(HostPages):
    """Each layer's copies are asked for when step() says so, and made at once; fails is what the next one raises."""

    __slots__ = ("fails", "waited", "_steps", "_reached", "begun")

    def __init__(self):
        super().__init__(num_pages=32, num_layers=MANY_LAYERS, run_bytes=RUN_BYTES)
        self.fails, self.waited, self.begun = None, [], 0
        self._steps, self._reached = queue.SimpleQueue(), queue.SimpleQueue()

    def copy_layers(self, addresses, pages, *, after):
        self.begun += 1
        for layer in range(MANY_LAYERS):
            self._reached.put(layer)
            assert self._steps.get(timeout=LONG_S)
            if self.fails is not None:
                raise self.fails
            for address, page in zip(addresses.tolist(), pages.tolist()):
                run = (np.ctypeslib.ctypes.c_uint8 * RUN_BYTES).from_address(address + layer * RUN_BYTES)
                self.pages[page, layer] = np.frombuffer(run, np.uint8)
            yield Ticket(layer)
        self._reached.put(MANY_LAYERS)

    def wait(self, ticket):
        self.waited.append(ticket.layer)

    def reached(self):
        """The layer that the loader is about to ask for."""
        return self._reached.get(timeout=LONG_S)

    def step(self):
        self._steps.put(True)


class Ticket:
    """Of a layer's copies, which have been made."""

    def __init__(self, layer):
        self.layer = layer

    def done(self):
        return True

    def wait(self):
        return None


class Waiter(threading.Thread):
    """Waits for a layer, or for all of a load (None)."""

    def __init__(self, handle, layer):
        super().__init__(daemon=True)
        self.handle, self.layer, self.found = handle, layer, None
        self.start()

    def run(self):
        try:
            self.found = self.handle.wait() if self.layer is None else self.handle.wait_layer(self.layer)
        except (RuntimeError, ValueError) as error:
            self.found = error

    def ended(self):
        self.join(LONG_S)
        assert not self.is_alive(), f"waits for layer {self.layer} for ever"
        return self.found


WHAT = st.sampled_from(["ask", "ask", "ask", "wait", "look", "fail", "cancel"])


@settings(deadline=None, max_examples=120)
@given(events=st.lists(st.tuples(WHAT, st.sampled_from([*range(MANY_LAYERS), None])), max_size=12))
def test_a_layer_is_told_of_once_it_has_been_asked_for(events):
    """Whoever waits for a layer goes on as soon as its copies have been asked for and never before; a failure reaches
    those who wait for layers that will not come, and a cancel everybody who still waits."""
    pages = Stepped()
    with TieredKVCache(pages, host=[host(8)]) as cache:
        prompt = keys("p", BLOCKS)
        put(cache, prompt)
        handle = cache.load(prompt, np.arange(BLOCKS))
        assert pages.reached() == 0
        asked, failed, cancelled, waiters = 0, False, False, []
        ended = lambda: failed or cancelled or asked == MANY_LAYERS  # noqa: E731
        for what, layer in [*events, ("look", None), *[("ask", None)] * MANY_LAYERS]:
            if what == "wait":
                waiters.append(Waiter(handle, layer))
            elif what == "look":
                assert handle.is_done == ended()
            elif what == "cancel" and not cancelled:
                if ended():
                    handle.cancel()
                else:  # the loader is between two layers: cancel() returns when it has seen it
                    cancelling = threading.Thread(target=handle.cancel, daemon=True)
                    cancelling.start()
                    while not handle._cancelled:
                        cancelling.join(0.001)
                    pages.step()
                    asked += 1
                    cancelling.join(LONG_S)
                    assert not cancelling.is_alive()
                cancelled = True
                pages.pages[:BLOCKS] = 0xDD
            elif what in ("ask", "fail") and not ended():
                pages.fails = RuntimeError("the GPU has fallen off the bus") if what == "fail" else None
                pages.step()
                if what == "fail":
                    failed = True
                else:
                    asked += 1
                    assert pages.reached() == asked
            settle(handle, asked, failed, cancelled)
            for one in list(waiters):
                needed = MANY_LAYERS if one.layer is None else one.layer + 1
                if asked >= needed or ended():
                    waiters.remove(one)
                    judge(one.ended(), needed, asked, failed, cancelled, handle, pages, prompt)
                else:
                    assert one.is_alive() and one.found is None, "goes on before its layer was asked for"
        assert not waiters
        assert cancelled or failed or handle.wait() == BLOCKS
        cache._waiter.submit(int).result(LONG_S)
        if cancelled:
            assert (pages.pages[:BLOCKS] == 0xDD).all()
        assert cancelled or failed or handle.ended_s < math.inf
        cache.free(prompt)
        assert cache.stats()["blocks"] == 0, "a block stays taken"
        cache._pool.check()


def settle(handle, asked, failed, cancelled):
    """Until the loader has told the handle of what it did."""
    with handle._changed:
        assert handle._changed.wait_for(
            lambda: cancelled or len(handle._layers) >= asked and (handle._is_asked or not failed and asked < MANY_LAYERS),
            LONG_S,
        )


def judge(found, needed, asked, failed, cancelled, handle, pages, prompt):
    if isinstance(found, ValueError):
        assert (cancelled or failed) and "cancelled" in str(found)  # a wait for all of a load that fails gives it up
    elif isinstance(found, RuntimeError):
        assert failed and 0 < asked < needed and "bus" in str(found)
    elif found == BLOCKS:
        assert asked >= needed
        if not cancelled:
            for page, key in enumerate(prompt):
                assert (pages.pages[page, :needed] == content(key)[:needed]).all()
    else:
        assert (found, asked, failed) == (0, 0, True)


def test_a_load_that_waits_for_its_turn_is_given_up_at_once():
    pages = Stepped()
    with TieredKVCache(pages, host=[host(8)]) as cache:
        prompt = keys("p", BLOCKS)
        put(cache, prompt)
        first, second = (cache.load(prompt, np.arange(at, at + BLOCKS)) for at in (0, BLOCKS))
        assert pages.reached() == 0
        ends(second.cancel)  # while the loader is still busy with the first
        assert second.is_done and not first.is_done
        for _ in range(MANY_LAYERS):
            pages.step()
        assert first.wait() == BLOCKS
        cache._loader.submit(int).result(LONG_S)
        check(pages, prompt, range(BLOCKS))
        assert pages.begun == 1 and (pages.pages[BLOCKS:] == 0xEE).all()


def test_close_ends_loads_that_wait_for_their_turn():
    pages, prompt = Stepped(), keys("p", BLOCKS)
    cache = TieredKVCache(pages, host=[host(8)])
    put(cache, prompt)
    loads = [cache.load(prompt, np.arange(at, at + BLOCKS)) for at in (0, BLOCKS)]
    closing = threading.Thread(target=cache.close, daemon=True)
    closing.start()
    closing.join(0.02)
    assert closing.is_alive(), "closed under a load"
    for _ in range(2 * MANY_LAYERS):
        pages.step()
    closing.join(LONG_S)
    assert not closing.is_alive() and [load.wait() for load in loads] == [BLOCKS] * 2
    check(pages, prompt * 2, range(2 * BLOCKS))


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not():
    pages, prompt = Stepped(), keys("p", BLOCKS)
    with TieredKVCache(pages, host=[host(8)]) as cache:
        put(cache, prompt)
        load, store = cache.load(prompt, np.arange(BLOCKS)), cache.store(keys("q", 2), np.arange(10, 12))
        calls = [load.wait, load.cancel, lambda: load.wait_layer(0), lambda: load.is_done, store.wait, store.wait_copied,
                 lambda: store.is_copied]  # fmt: skip
        with load._changed:  # as another thread may hold it at that moment
            child = os.fork()
        if child == 0:
            refused = 0
            for call in calls:
                try:
                    call()
                except ValueError as error:
                    refused += "forked" in str(error)
            os._exit(int(refused != len(calls)))
        for _ in range(MANY_LAYERS):
            pages.step()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert load.wait() == BLOCKS


class Interrupted(HostPages):
    """Whoever asks for copies is interrupted; nothing of it is under way then."""

    __slots__ = ("error",)

    def copy_in(self, addresses, pages, *, after, each_layer):
        if self.error is not None:
            raise self.error
        return super().copy_in(addresses, pages, after=after, each_layer=each_layer)


def test_an_interrupted_caller_leaves_no_block_taken(monkeypatch):
    monkeypatch.setattr(load_parts, "LONG_LOAD_BYTES", math.inf)
    pages, prompt = Interrupted(num_pages=16, num_layers=3, run_bytes=BLOCK_BYTES // 3), keys("p", BLOCKS)
    pages.error = None
    with TieredKVCache(pages, host=[host(8)]) as cache:
        put(cache, prompt)
        pages.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            cache.load(prompt, np.arange(BLOCKS))
        pages.error = None
        cache._waiter.submit(int).result(LONG_S)
        assert cache.load(prompt, np.arange(BLOCKS)).wait() == BLOCKS
        cache._waiter.submit(int).result(LONG_S)
        cache.free(prompt)
        assert cache.stats()["blocks"] == 0


def test_only_long_loads_are_asked_for_aside(monkeypatch):
    monkeypatch.setattr(load_parts, "LONG_LOAD_BYTES", 3 * BLOCK_BYTES)
    threads = []

    class Noted(HostPages):
        __slots__ = ()

        def copy_in(self, addresses, pages, *, after, each_layer):
            threads.append(threading.current_thread())
            return super().copy_in(addresses, pages, after=after, each_layer=each_layer)

    with TieredKVCache(Noted(num_pages=16, num_layers=3, run_bytes=RUN_BYTES), host=[host(8)]) as cache:
        prompt = keys("p", BLOCKS)
        put(cache, prompt)
        for blocks, aside in ((1, False), (3, False), (4, True), (5, True)):
            assert cache.load(prompt[:blocks], np.arange(blocks)).wait() == blocks
            assert (threads.pop() is not threading.current_thread()) == aside
            check(cache.device, prompt[:blocks], range(blocks))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), part=st.sampled_from([0.0, 0.05, 0.3]), on_disk=st.booleans())
def test_random_loads_under_faults_of_the_gpu(tmp_path_factory, seed, part, on_disk):
    """Several at a time, long and short ones, with copies that are made later and may fail when they are asked for or
    when they are made: what a load calls valid is right, and nothing is written after a cancel or a failed wait."""
    rng = np.random.default_rng(seed)
    lock = threading.Lock()

    def fault(name):
        with lock:
            fails = name in ("in", "copy") and rng.random() < rate[0]
        return RuntimeError("of the GPU") if fails else None

    pages, rate = LanePages(60, slow_s=0.0005, seed=seed), [0.0]
    pages.fault = fault
    stores = [disk(tmp_path_factory.mktemp("disk") / "a")] if on_disk else []
    cache = TieredKVCache(pages, host=[host(20)], disks=stores)
    try:
        prompts = [keys(f"{seed} {name}", 8) for name in range(3)]
        for prompt in prompts:
            put(cache, prompt)
        rate[0] = part
        under_way = []
        for turn in range(12):
            with lock:
                load_parts.LONG_LOAD_BYTES = int(rng.choice([0, 4 * BLOCK_BYTES, 10**9]))
                prompt, first = prompts[int(rng.integers(3))][: int(rng.integers(1, 9))], 8 * (turn % 6)
                what, layer = int(rng.integers(5)), int(rng.integers(3))
            places = np.arange(first, first + len(prompt))
            pages.pages[places] = 0xEE
            under_way.append((cache.load(prompt, places), prompt, places, what, layer))
            if len(under_way) == 5:
                end(pages, *under_way.pop(0))
        for one in under_way:
            end(pages, *one)
        rate[0] = 0.0
    finally:
        ends(cache.close)
        pages.close()
    cache._pool.check()
    assert sum(map(cache._pool.evictable, range(len(cache._pool.tiers)))) == len(cache._pool), "a block stays taken"


def end(pages, load, prompt, places, what, layer):
    valid = 0
    try:
        if what == 0:
            ends(load.cancel)
        else:
            if what > 2:
                valid = load.wait_layer(layer)
                for key, page in zip(prompt[:valid], places):
                    assert (pages.pages[page, layer] == content(key)[layer]).all(), "wrong KV"
            again = load.wait()
            assert again == valid or what <= 2
            check(pages, prompt[:again], places)
    except RuntimeError:
        ends(load.cancel)
    if load._cancelled:
        pages.pages[places] = 0xDD
        threading.Event().wait(0.002)
        assert (pages.pages[places] == 0xDD).all(), "written after the end"
