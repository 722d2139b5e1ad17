"""gpu.cache.tiers.transfer on a CuPy of host memory: what it launches and copies, in which order, on which stream."""
import ctypes
import itertools
import os
import sys
import threading

import numpy as np
import pytest
from fake_gpu import FakeArray, memory
from pool_cases import check, content, disk, host, keys
from streams_on_cpu import LAYERS, RUN, Event, Stream, make

from gpu.cache import dma
from gpu.cache.tiers import transfer
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.devices import copy_way
from pkvsim.memory.blocks.block_sums import block_sums


@pytest.mark.parametrize("combined", [True, False])
def test_blocks_go_out_and_come_back_layer_by_layer(fake, combined):
    pages, each = make(combined=combined, ways=("kernel", "kernel")), 1 if combined else 2  # runs of a layer
    assert (pages.block_bytes, pages.num_pages, pages.run_bytes) == (LAYERS * 2 * RUN, 16, 2 * RUN // each)
    prompt = keys("p", 5)
    with TieredKVCache(pages, host=[host(8)]) as cache:
        for key, page in zip(prompt, (3, 9, 1, 15, 0)):
            pages.both[:, page] = content(key).reshape(LAYERS, 2, RUN)
        cache.store(prompt, [3, 9, 1, 15, 0]).wait()
        handle = cache.load(prompt, [2, 4, 6, 8, 10])
        assert [handle.wait_layer(layer) for layer in range(LAYERS)] == [5] * LAYERS
        handle.wait()
        check(pages, prompt, [2, 4, 6, 8, 10])
    layers, _, stores = Stream.made[:3]
    assert [(name, stream, first, count) for name, _, stream, first, count, _ in fake.launches] == [
        ("pkv_scatter", stores.ptr, 0, each * LAYERS),
        *(("pkv_gather", layers.ptr, each * at, each) for at in range(LAYERS))]
    # Loads wait for the caller's mark, and the caller's stream for the layers' events alone.
    recorded = [event for what, event in layers.told if what == "record"]
    assert layers.told[0][0] == "wait" and len(recorded) == LAYERS
    assert [event for what, stream, event in fake.waits if what == "wait" and stream == 7] == recorded


def test_many_blocks_take_several_launches(fake):
    fake.monkeypatch.setattr(transfer, "MAX_VECTORS", 2 * 2 * LAYERS * RUN // 16)
    pages = make(ways=("kernel", "kernel"))
    buffer = np.random.default_rng(0).integers(0, 256, (5, pages.block_bytes), np.uint8)
    addresses = buffer.ctypes.data + np.arange(5) * pages.block_bytes
    pages.copy_in(addresses, np.arange(5), after=pages.mark(), each_layer=False)
    assert [count for *_, count in fake.launches] == [2, 2, 1]
    assert (pages.pages[:5].reshape(5, -1) == buffer).all()


def copy_batch(targets, sources, sizes, count, attributes, first, num_attributes, failed, stream):
    """cuMemcpyBatchAsync, at once."""
    assert (num_attributes.value, first._obj.value, attributes._obj.order) == (1, 0, 1)
    arrays = [memory(pointer.value, np.int64, (count.value,)) for pointer in (targets, sources, sizes)]
    for target, source, size in zip(*arrays):
        ctypes.memmove(int(target), int(source), int(size))
    return 0


@pytest.mark.parametrize("has_batch", [True, False])
def test_long_runs_go_by_dma(fake, has_batch):
    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: copy_batch if has_batch else None)
    pages = make(ways=("dma", "dma"))
    there_and_back(pages)
    assert not fake.launches


@pytest.mark.parametrize("way", ["kernel", "dma", "staged"])
def test_paced_copies_have_a_few_parts_under_way_and_wait_in_line_with_disks(fake, way):
    """A further part is asked for as the fourth before it arrives; a call has no more copies than allowed, and all of
    them are on the stream of disks' blocks, whose copies come in the order asked for."""
    seen = []

    def batch(targets, sources, sizes, count, attributes, first, num_attributes, failed, stream):
        seen.append((count.value, sum(event.done for event in Event.made), stream.value))
        return copy_batch(targets, sources, sizes, count, attributes, first, num_attributes, failed, stream)

    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: batch)
    fake.monkeypatch.setattr(transfer, "BATCH_COPIES", 2)
    fake.monkeypatch.setattr(transfer, "PACED_PARTS", 4)
    fake.monkeypatch.setattr(copy_way, "PIECE_BYTES", 2 * RUN)
    buffer = np.random.default_rng(3).integers(0, 256, (3, LAYERS * 2 * RUN), np.uint8)
    addresses = buffer.ctypes.data + np.arange(3) * LAYERS * 2 * RUN
    small = [(1, max(0, at - 3)) for at in range(3 * LAYERS)]  # parts of one block
    large = [(2, 0), (1, 0)] * LAYERS if way == "dma" else [(3, 0)] * LAYERS  # of all, and no wait for three of them
    for paced_bytes, wanted in ((1, small), (10**9, large)):
        fake.monkeypatch.setattr(transfer, "PACED_BYTES", paced_bytes)
        Stream.made.clear(), fake.launches.clear()
        pages = make(ways=(way, way), staging_bytes=(3 * 2 * RUN, 3 * LAYERS * 2 * RUN, 3 * LAYERS * 2 * RUN))
        loads, disks, stores = Stream.made[:3]
        seen.clear(), Event.made.clear()
        tickets = list(pages.copy_layers(addresses, np.array([4, 0, 9]), after=pages.mark()))
        assert len(tickets) == LAYERS and (pages.pages[[4, 0, 9]].reshape(3, -1) == buffer).all()
        assert not loads.told and not stores.told
        if way == "kernel":
            assert [(count, stream) for _, _, stream, _, _, count in fake.launches] == [
                (count, disks.ptr) for count, _ in wanted]
        else:
            assert seen == [(count, done, disks.ptr) for count, done in wanted]
        assert len({ticket.event.ptr for ticket in tickets}) == LAYERS == pages.load_steps


@pytest.mark.parametrize("way", ["dma", "staged"])
def test_copies_that_fail_half_way_have_ended_before_anybody_is_told(fake, way):
    """Their buffers serve others at once, and a cancelled load's pages too."""
    left = [2]

    def batch(*arguments):
        left[0] -= 1
        return copy_batch(*arguments) if left[0] else 1

    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: batch)
    pages = make(ways=(way, way))
    buffer = np.zeros((2, pages.block_bytes), np.uint8)
    addresses = buffer.ctypes.data + np.arange(2) * pages.block_bytes
    fake.monkeypatch.setattr(transfer, "BATCH_COPIES", 1)
    pages.copy_in(addresses[:1], np.array([4]), after=pages.mark(), each_layer=False) if way == "staged" else None
    with pytest.raises(RuntimeError, match="status 1"):
        pages.copy_in(addresses, np.array([4, 0]), after=pages.mark(), each_layer=False)
    used = [stream for stream in Stream.made if stream.told]
    assert used and all(stream.told[-1] == ("synchronize",) for stream in used)


@pytest.mark.parametrize("way", ["kernel", "dma", "staged"])
def test_paced_layers_are_given_as_they_are_asked_for(fake, way):
    """A ticket comes when its layer's copies and its event have been asked for, and nothing of later ones; whoever
    stops has tickets of everything. What fails on the way leaves the tickets given before, and has ended."""
    left = [10**9]

    def batch(*arguments):
        left[0] -= 1
        return copy_batch(*arguments) if left[0] >= 0 else 1

    launch = transfer.CudaPages._launch

    def launching(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("status 1")
        launch(self, *arguments)

    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: batch)
    fake.monkeypatch.setattr(transfer.CudaPages, "_launch", launching)
    fake.monkeypatch.setattr(copy_way, "PIECE_BYTES", 2 * RUN)
    buffer = np.random.default_rng(6).integers(0, 255, (3, LAYERS * 2 * RUN), np.uint8)
    addresses = buffer.ctypes.data + np.arange(3) * LAYERS * 2 * RUN
    for stops in range(LAYERS + 1):
        pages = make(ways=(way, way), staging_bytes=(3 * 2 * RUN, 3 * LAYERS * 2 * RUN, 3 * LAYERS * 2 * RUN))
        pages.both[:] = 0xFF
        layers, tickets = pages.copy_layers(addresses, np.array([4, 0, 9]), after=pages.mark()), []
        for at in range(LAYERS):
            if at == stops:
                left[0] = 0
                with pytest.raises(RuntimeError, match="status 1"):
                    next(layers)
                used = [stream for stream in Stream.made if stream.told and stream is not pages._streams[2]]
                assert used[-1].told[-1] == ("synchronize",)
                break
            tickets.append(next(layers))
            recorded = [what for stream in Stream.made for what in stream.told]
            assert ("record", tickets[-1].event.ptr) in recorded
            wanted = buffer.reshape(3, LAYERS, -1)[:, : at + 1]
            assert (pages.pages[[4, 0, 9]].reshape(3, LAYERS, -1)[:, : at + 1] == wanted).all()
            assert (pages.pages[[4, 0, 9]].reshape(3, LAYERS, -1)[:, at + 1 :] == 0xFF).all()
        layers.close()
        assert len({ticket.event.ptr for ticket in tickets}) == stops
        left[0] = 10**9
        Stream.made.clear()


def there_and_back(pages):
    """Blocks that come in layer by layer, whole and go out again are what they were."""
    wanted = np.random.default_rng(1).integers(0, 256, (4, pages.block_bytes), np.uint8)
    addresses = wanted.ctypes.data + np.arange(4) * pages.block_bytes
    assert len(pages.copy_in(addresses, np.array([5, 2, 7, 0]), after=pages.mark(), each_layer=True)) == LAYERS
    assert (pages.pages[[5, 2, 7, 0]].reshape(4, -1) == wanted).all()
    assert len(pages.copy_in(addresses, np.array([1, 3, 15, 4]), after=pages.mark(), each_layer=False)) == 1
    assert (pages.pages[[1, 3, 15, 4]].reshape(4, -1) == wanted).all()
    before = wanted.copy()
    wanted[:] = 0
    pages.copy_out(np.array([5, 2, 7, 0]), addresses, after=pages.mark())
    assert (wanted == before).all()


@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_pieces_of_layers_are_staged(fake, combined, layers):
    """Rings of two pieces a slot, so that four blocks go through every slot."""
    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: copy_batch)
    piece = layers * 2 * RUN
    fake.monkeypatch.setattr(copy_way, "PIECE_BYTES", piece)
    pages = make(combined=combined, ways=("staged", "staged"), staging_bytes=(2 * piece, 2 * piece, 2 * LAYERS * 2 * RUN))
    assert pages.load_steps == -(-LAYERS // layers)
    there_and_back(pages)
    each, rounds = 1 if combined else 2, 2 * pages.load_steps
    assert [call[:2] + call[3:] for call in fake.launches[:rounds]] == [
        ("pkv_gather", 16, 0, each * min(layers, LAYERS - layers * (at // 2)), 2) for at in range(rounds)]  # fmt: skip


def test_a_gpu_without_room_for_a_ring_has_its_pages_moved_all_the_same(fake):
    def no_room(size, dtype):
        raise MemoryError

    fake.monkeypatch.setattr(sys.modules["cupy"], "empty", no_room, raising=False)
    pages = make(ways=("staged", "staged"))
    assert pages.ways == ("kernel", "kernel") and pages.load_steps == LAYERS
    there_and_back(pages)


@pytest.mark.parametrize(("lost", "ways"), [
    (0, ["kernel", "staged", "staged"]), (1, ["staged", "kernel", "staged"]), (2, ["staged", "staged", "kernel"]),
])  # fmt: skip
def test_a_ring_that_has_no_room_costs_no_other_its_way(fake, lost, ways):
    """Blocks of host memory, of disks, and to the host each have a ring; host memory's go in line with disks' still."""
    count = itertools.count()

    def ring(*arguments, **options):
        if next(count) == lost:
            raise MemoryError
        return dma.StagingRing(*arguments, **options)

    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: copy_batch)
    fake.monkeypatch.setattr(transfer, "StagingRing", ring)
    pages = make(ways=("staged", "staged"))
    assert pages._ways == ways and pages.ways == (ways[0], ways[2])
    there_and_back(pages)
    loads = Stream.made[0]
    told, wanted = len(loads.told), np.random.default_rng(4).integers(0, 256, (2, pages.block_bytes), np.uint8)
    addresses = wanted.ctypes.data + np.arange(2) * pages.block_bytes
    list(pages.copy_layers(addresses, np.array([3, 8]), after=pages.mark()))
    assert (pages.pages[[3, 8]].reshape(2, -1) == wanted).all() and len(loads.told) == told


def test_a_disks_blocks_are_handed_over_while_others_are_still_asked_for(fake):
    """What a disk has read would fill its ring, and the disk would wait, for as long as a long load is handed over."""
    entered, release = threading.Event(), threading.Event()

    def batch(*arguments):
        if threading.current_thread().name == "long":
            entered.set()
            assert release.wait(10)
        return copy_batch(*arguments)

    fake.monkeypatch.setattr(dma, "_batch_copy", lambda: batch)
    wanted = np.random.default_rng(2).integers(0, 256, (4, LAYERS * 2 * RUN), np.uint8)
    addresses = wanted.ctypes.data + np.arange(4) * LAYERS * 2 * RUN
    for way in ("dma", "staged"):
        pages = make(ways=(way, way))
        entered.clear(), release.clear()
        host = threading.Thread(
            target=pages.copy_in, args=(addresses[:2], np.array([0, 1])), kwargs={"after": pages.mark(), "each_layer": True},
            name="long",
        )  # fmt: skip
        host.start()
        assert entered.wait(10)
        pages.copy_in(addresses[2:], np.array([2, 3]), after=pages.mark(), each_layer=False)
        assert (pages.pages[[2, 3]].reshape(2, -1) == wanted[2:]).all() and not pages.pages[:2].any()
        release.set()
        host.join()
        assert (pages.pages[:2].reshape(2, -1) == wanted[:2]).all()


def test_pages_that_do_not_fit_each_other_are_named(fake):
    good = FakeArray(np.zeros((4, 64), np.uint8))
    with pytest.raises(ValueError, match="ways: expected two of kernel, dma, staged"):
        transfer.CudaPages([good], [good], ways=("dma", "staging"))
    for k, v, said in (
        ([], [], "one of each"), ([good], [], "one of each"), ([good], [FakeArray(np.zeros((4, 32), np.uint8))], "v_pages"),
        ([FakeArray(np.zeros((4, 24), np.uint8))] , [FakeArray(np.zeros((4, 24), np.uint8))], "boundaries"),
        ([FakeArray(np.zeros((4, 4, 32), np.uint8)[:, ::2])], [FakeArray(np.zeros((4, 4, 32), np.uint8)[:, ::2])], "one piece"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            transfer.CudaPages(k, v)


@pytest.mark.parametrize("combined", [True, False])
def test_sums_are_those_of_the_pages_once_what_they_wait_for_is_there(fake, combined):
    pages = make(combined=combined, ways=("kernel", "kernel"))
    pages.both[:] = np.random.default_rng(5).integers(0, 256, pages.both.shape, np.uint8)
    places = np.array([3, 11, 0])
    wanted = block_sums(np.ascontiguousarray(pages.pages[places]).reshape(3, -1))
    mark = pages.mark()
    blocks = np.zeros((1, pages.block_bytes), np.uint8)
    ticket = pages.copy_in(blocks.ctypes.data + np.zeros(1, np.int64), np.array([7]), after=mark, each_layer=False)[0]
    stream = Stream.made[-1]
    assert stream not in Stream.made[:3] and not stream.told
    for after, event in ((mark, mark), (ticket, ticket.event)):
        sums = pages.sums(places, after=after)
        assert stream.told == [("wait", event.ptr), ("record", sums.event.ptr)]
        sums.wait()
        assert sums.done() and (sums.values() == wanted).all()
        stream.told.clear()
    assert (pages.sums(np.array([7]), after=ticket).values() == block_sums(blocks)).all()


@pytest.mark.parametrize("combined", [True, False])
def test_a_disks_blocks_are_compared_where_they_have_arrived(fake, tmp_path, combined):
    """A bit that flips between the disk and the pages costs that block and those behind it, once."""
    pages = make(combined=combined, ways=("kernel", "kernel"))
    prompt, store = keys("p", 6), disk(tmp_path / "a")
    with TieredKVCache(pages, disks=[store]) as cache:
        for at, key in enumerate(prompt):
            pages.both[:, at] = content(key).reshape(LAYERS, 2, RUN)
        cache.store(prompt, range(6)).wait()
        copy_in = transfer.CudaPages.copy_in

        def flipping(self, addresses, places, **options):
            tickets = copy_in(self, addresses, places, **options)
            if 8 in places:
                self.both[1, 8, 0, 100] ^= 4
            return tickets

        fake.monkeypatch.setattr(transfer.CudaPages, "copy_in", flipping)
        handle = cache.load(prompt, [5, 6, 7, 8, 9, 10])
        assert handle.wait() == 3 and cache.stats()["a"]["last_fault"] == "wrong sums"
        check(pages, prompt[:3], [5, 6, 7])
        assert cache.lookup(prompt) == 3 and cache.stats()["a"]["faults"] == 1


def test_queues_are_asked_for_where_the_user_has_not_said_how_many(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for said, wanted in ((None, "32"), ("1", "1")):
        if said is not None:
            monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", said)
        dma.ask_for_queues()
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == wanted
