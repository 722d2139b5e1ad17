"""A CuPy of host memory whose streams do their work as it is asked for and note it, with gpu.cache.tiers' kernels."""
from __future__ import annotations

import contextlib
import ctypes
import sys
import types

import numpy as np
import pytest
from fake_gpu import FakeArray, memory

from gpu.cache.tiers import cuda_sums, transfer
from gpu.kernels import fields
from pkvsim.memory.blocks.block_sums import SUMS, block_sums

LAYERS, RUN = 3, 2048  # K or V of a page of a layer: pool_cases has 4096 for both


class Stream:
    """Work is done as it is asked for; what was asked for is noted."""

    made: list = []

    def __init__(self, non_blocking, priority=0):
        assert non_blocking
        self.ptr, self.told = 100 + len(Stream.made), []
        Stream.made.append(self)

    def wait_event(self, event):
        self.told.append(("wait", event.ptr))

    def synchronize(self):
        self.told.append(("synchronize",))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Event:
    count = 0
    made: list = []

    def __init__(self, block=False, disable_timing=False):
        assert disable_timing
        Event.count += 1
        self.ptr, self.done = Event.count, False
        Event.made.append(self)

    def record(self, stream):
        stream.told.append(("record", self.ptr))

    def synchronize(self):
        self.done = True


@pytest.fixture
def fake(monkeypatch):
    Stream.made = []
    waits = []
    device = contextlib.nullcontext()
    current = types.SimpleNamespace(ptr=7, synchronize=lambda: None)
    cuda = types.SimpleNamespace(
        Stream=Stream, Event=Event, Device=lambda index=0: device, get_current_stream=lambda: current,
        runtime=types.SimpleNamespace(
            eventRecord=lambda event, stream: waits.append(("mark", event, stream)),
            streamWaitEvent=lambda stream, event, flags: waits.append(("wait", stream, event)),
            memcpyAsync=lambda to, source, size, kind, stream: ctypes.memmove(to, source, size),
            memcpyDefault=4, memcpyDeviceToHost=2,
        ),
        alloc_pinned_memory=bytearray,
    )  # fmt: skip
    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(ndarray=FakeArray, cuda=cuda, asarray=lambda array: FakeArray(np.array(array)), uint8=np.uint8, uint64=np.uint64, zeros=lambda shape, dtype: FakeArray(np.zeros(shape, dtype)),
                         empty=lambda size, dtype: FakeArray(np.full(size, 0xEE, dtype)))  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    launches = []

    def add_up(names, args):
        """pkv_block_sums."""
        at = types.SimpleNamespace(**dict(zip(names, args)))
        pages, bases = memory(at.pages, np.int32, (at.num_blocks,)), memory(at.bases, np.int64, (at.runs_per_block,))
        sums = memory(at.sums, np.uint64, (at.num_blocks, SUMS))
        for block, page in enumerate(pages.tolist()):
            runs = [memory(int(base) + page * at.page_stride, np.uint8, (at.run_bytes,)) for base in bases]
            sums[block] += block_sums(np.concatenate(runs)[None])[0]

    def load_kernel(file_name, kernel_name, defines, *, threads):
        if kernel_name == "pkv_block_sums":
            assert file_name == "block_sums.cu" and threads == defines["THREADS"] == 256
            names = fields.names(kernel_name, defines)
            return lambda grid, args, stream: add_up(names, args)
        assert file_name == "gather.cu" and threads == defines["THREADS"] == 512

        def launch(grid, args, stream):
            names = fields.names(kernel_name, defines)
            for value, letter in zip(args, fields.signature(kernel_name, defines), strict=True):
                assert isinstance(value, (int, np.integer)), letter
            at = types.SimpleNamespace(**dict(zip(names, args)))
            launches.append((kernel_name, grid, stream, at.first_run, at.num_runs, at.num_blocks))
            hosts, pages = memory(at.hosts, np.int64, (at.num_blocks,)), memory(at.pages, np.int32, (at.num_blocks,))
            bases = memory(at.bases, np.int64, (at.first_run + at.num_runs,))
            for block in range(at.num_blocks):
                for run in range(at.first_run, at.first_run + at.num_runs):
                    ends = [int(bases[run]) + int(pages[block]) * at.page_stride, int(hosts[block]) + run * at.run_bytes]
                    ctypes.memmove(*(ends if kernel_name == "pkv_gather" else ends[::-1]), at.run_bytes)

        return launch

    for module in (transfer, cuda_sums):
        monkeypatch.setattr(module, "load_kernel", load_kernel)
    return types.SimpleNamespace(launches=launches, waits=waits, monkeypatch=monkeypatch)


class Pages(transfer.CudaPages):
    """With the pages as pool_cases looks at them."""

    __slots__ = ("both",)

    def __init__(self, both, **options):
        super().__init__(*([FakeArray(both[layer, :, part]) for layer in range(LAYERS)] for part in range(2)), **options)
        self.both = both  # [layers, pages, 2, bytes]

    @property
    def pages(self):
        return self.both.transpose(1, 0, 2, 3).reshape(self.both.shape[1], LAYERS, 2 * RUN)


def make(*, combined=True, **options):
    """Combined pages: K and V of a page beside each other, so that they are one run and a page's stride is its bytes.
    Others: K and V of a layer in arrays of their own."""
    raw = np.zeros(LAYERS * 16 * 2 * RUN + 16, np.uint8)
    begin = -raw.ctypes.data % 16
    raw = raw[begin : begin + LAYERS * 16 * 2 * RUN]
    return Pages(raw.reshape(LAYERS, 16, 2, RUN) if combined else raw.reshape(LAYERS, 2, 16, RUN).swapaxes(1, 2), **options)
