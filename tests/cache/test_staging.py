"""gpu.cache.dma's ring on streams that run in any order which their events allow: a slot is never used too soon."""
import sys
import types

import numpy as np
import pytest
from fake_gpu import FakeArray, memory
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.cache import dma

RUN = 16


class Streams:
    """Work that has been asked for and not been done: for each stream, in its order."""

    def __init__(self):
        self.queues, self.done = [], []

    def step(self, choose):
        """Does one piece of work, of those that may be next; False where nothing is left."""
        ready = [at for at, queue in enumerate(self.queues) if queue and self._may(queue[0])]
        if not ready:
            assert not any(self.queues), "streams wait for each other"
            return False
        at = choose(ready)
        what = self.queues[at].pop(0)
        if not isinstance(what, tuple):
            what()
        self.done[at] += 1
        return True

    def _may(self, what):
        return not isinstance(what, tuple) or self.done[what[0]] >= what[1]


def make_cuda(streams):
    class Stream:
        def __init__(self, non_blocking=True, priority=0):
            self.ptr = len(streams.queues)
            streams.queues.append([]), streams.done.append(0)

        def add(self, what):
            streams.queues[self.ptr].append(what)

        def wait_event(self, event):
            self.add(event.point)

    class Event:
        def __init__(self, disable_timing):
            self.point = 0, 0  # not recorded: nobody waits for it

        def record(self, stream):
            stream.add(lambda: None)
            self.point = stream.ptr, streams.done[stream.ptr] + len(streams.queues[stream.ptr])

    return types.SimpleNamespace(Stream=Stream, Event=Event)


@settings(max_examples=50, deadline=None)
@given(
    to_host=st.booleans(), blocks=st.integers(0, 9), layers=st.integers(1, 4), in_piece=st.integers(1, 4),
    pieces=st.integers(1, 3), copies=st.integers(1, 2), slots=st.integers(2, 4), early=st.integers(0, 40), rng=st.randoms(),
)  # fmt: skip
def test_no_slot_is_filled_before_it_is_empty_or_emptied_before_it_is_full(
    to_host, blocks, layers, in_piece, pieces, copies, slots, early, rng
):
    streams = Streams()
    cuda = make_cuda(streams)
    cupy = types.SimpleNamespace(cuda=cuda, uint8=np.uint8, asarray=lambda array: FakeArray(np.array(array)),
                                 empty=lambda size, dtype: FakeArray(np.zeros(size, dtype)))  # fmt: skip
    host = np.random.default_rng(0).integers(1, 256, (copies, 9, layers, RUN), np.uint8)
    gpu = np.random.default_rng(1).integers(1, 256, (copies, 9, layers, RUN), np.uint8)
    pages = np.stack([np.random.default_rng(at).permutation(9) for at in range(copies)]).astype(np.int32)
    wanted_gpu, wanted_host, which = gpu.copy(), host.copy(), {}
    for at in range(copies):
        which[pages[at].ctypes.data] = at
        if to_host:
            wanted_host[at, :blocks] = gpu[at, pages[at, :blocks]]
        else:
            wanted_gpu[at, pages[at, :blocks]] = host[at, :blocks]

    def copy_runs(targets, sources, num_bytes, stream):
        def work():
            for target, source in zip(targets.tolist(), sources.tolist()):
                memory(target, np.uint8, (num_bytes,))[:] = memory(source, np.uint8, (num_bytes,))

        streams.queues[stream].append(work)

    def launch(hosts, page_numbers, count, first_run, num_runs, stream):
        at = max(pointer for pointer in which if pointer <= page_numbers)

        def work():
            staged, places = memory(hosts, np.int64, (count,)), memory(page_numbers, np.int32, (count,))
            for address, page in zip(staged.tolist(), places.tolist()):
                piece, runs = memory(address, np.uint8, (num_runs, RUN)), gpu[which[at], page, first_run:][:num_runs]
                if to_host:
                    piece[:] = runs
                else:
                    runs[:] = piece

        stream.add(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setattr(dma, "copy_runs", copy_runs)
        in_piece = min(in_piece, layers)
        ring = dma.StagingRing(cuda.Stream(), layers=in_piece, piece_bytes=in_piece * RUN, slots=slots, pieces=pieces,
                               to_host=to_host, launch=launch)  # fmt: skip
        for at in range(copies):
            addresses = host[at].ctypes.data + np.arange(blocks) * layers * RUN
            for layer in range(0, layers, in_piece):
                count = min(in_piece, layers - layer)
                ring.copy(addresses + layer * RUN, pages[at].ctypes.data, layer, count, count * RUN)
                for _ in range(rng.randrange(early + 1)):
                    streams.step(rng.choice)
        while streams.step(rng.choice):
            pass
    assert (gpu == wanted_gpu).all() and (host == wanted_host).all()
