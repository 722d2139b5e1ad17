"""The only timing helper: cold-L2 kernel time inside CUDA graphs, wall time, and the streaming limit.

Everything is captured by torch.cuda.CUDAGraph on one stream that CuPy shares, so that FlashInfer's
kernels and ours are timed by the same events in the same kind of graph.
"""
from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

COLD_FACTOR = 4  # a rotation must touch this many times the L2 before it reads a byte again
MIN_GRAPH_US = 2000.0  # a shorter graph lets its own launch show in the time per call

# (CTAs per SM, threads, 16-byte loads in flight per thread)
STREAM_SHAPES = ((1, 256, 4), (1, 512, 4), (1, 1024, 4), (2, 512, 4), (2, 1024, 4), (2, 1024, 8), (4, 512, 8),
                 (8, 256, 8))


@dataclass(frozen=True, slots=True)
class Timing:
    """Time per call over `repeats` graph replays of `calls` calls each."""

    median_us: float
    min_us: float
    max_us: float
    calls: int
    repeats: int

    @property
    def spread(self) -> float:
        return (self.max_us - self.min_us) / self.median_us


@contextlib.contextmanager
def shared_stream() -> Iterator[object]:
    """One side stream that is current for both torch and CuPy; drained at the end."""
    import cupy
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        yield stream
    torch.cuda.synchronize()


def l2_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def rotation_length(bytes_per_call: int, *, l2_size: int) -> int:
    """How many calls on distinct bytes make the first call's bytes cold again."""
    return COLD_FACTOR * l2_size // bytes_per_call + 1


def capture(body: Callable[[], None]):
    """A torch CUDA graph of what `body` launches on the current (shared) stream."""
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Relaxed: a first-use allocation by another library's pool must not abort the capture.
    graph.capture_begin(capture_error_mode="relaxed")
    try:
        body()
    finally:
        graph.capture_end()
    return graph


def graph_time_us(run_one: Callable[[int], None], *, variants: int, repeats: int = 5,
                  min_graph_us: float = MIN_GRAPH_US) -> Timing:
    """Time per call of run_one(0), run_one(1), .. run_one(variants - 1), captured in one graph.

    The caller makes the variants read distinct bytes (rotation_length says how many are cold). The
    rotation is captured as often as it takes to fill min_graph_us.
    """
    if variants < 1 or repeats < 1:
        raise ValueError(f"variants, repeats: expected >= 1, got {variants}, {repeats}")
    with shared_stream() as stream:
        for index in range(min(variants, 2)):  # first use: compile, load, allocate outside the capture
            run_one(index)
        graph = capture(lambda: _rotate(run_one, variants=variants, rounds=1))
        _replay_us(graph, stream, repeats=1)
        once_us = _replay_us(graph, stream, repeats=1)[0]
        rounds = max(1, math.ceil(min_graph_us / once_us))
        if rounds > 1:
            graph = capture(lambda: _rotate(run_one, variants=variants, rounds=rounds))
            _replay_us(graph, stream, repeats=1)
        calls = variants * rounds
        per_call = [us / calls for us in _replay_us(graph, stream, repeats=repeats)]
    return Timing(median_us=statistics.median(per_call), min_us=min(per_call), max_us=max(per_call), calls=calls,
                  repeats=repeats)


def _rotate(run_one: Callable[[int], None], *, variants: int, rounds: int) -> None:
    for _ in range(rounds):
        for index in range(variants):
            run_one(index)


def _replay_us(graph, stream, *, repeats: int) -> list[float]:
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record(stream)
    for mark in marks[1:]:
        graph.replay()
        mark.record(stream)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(marks, marks[1:])]


def wall_time_us(fn: Callable[[], None], repeats: int, *, before: Callable[[], None] | None = None) -> float:
    """Median wall time of fn() followed by a device synchronise; `before` runs untimed ahead of each."""
    import torch

    times = []
    for index in range(repeats + 2):
        if before is not None:
            before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        if index >= 2:  # the first calls allocate and load
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


class StreamLimit:
    """Shortest time in which a read-only kernel streams that many bytes of `buffer`, cold."""

    __slots__ = ("_buffer", "_known", "_sink", "_kernels", "_num_sms", "_l2")

    def __init__(self, buffer) -> None:
        """buffer: a contiguous torch CUDA tensor, the pool that the decode kernels read."""
        import torch

        from gpu.kernels import compile as kernels

        self._buffer = buffer
        self._known: dict[int, float] = {}
        self._sink = torch.zeros(1, dtype=torch.int32, device=buffer.device)
        self._kernels = {unroll: kernels.load_module("stream.cu", {"UNROLL": unroll}).get_function("pkv_stream_read")
                         for unroll in {shape[2] for shape in STREAM_SHAPES}}
        self._num_sms = torch.cuda.get_device_properties(buffer.device).multi_processor_count
        self._l2 = l2_bytes()

    def launch(self, num_bytes: int, *, offset: int = 0, launch_shape: tuple[int, int, int] = STREAM_SHAPES[4]) -> None:
        """Reads buffer bytes [offset, offset + num_bytes) on CuPy's current stream."""
        per_sm, threads, unroll = launch_shape
        self._kernels[unroll]((per_sm * self._num_sms,), (threads,),
                              (np.uint64(self._buffer.data_ptr() + offset), np.int64(num_bytes // 16),
                               np.uint64(self._sink.data_ptr())))

    def time_us(self, num_bytes: int, *, repeats: int = 3) -> float:
        """Best of STREAM_SHAPES, measured once per byte count."""
        num_bytes -= num_bytes % 16
        if num_bytes not in self._known:
            room = self._buffer.numel() * self._buffer.element_size() // num_bytes
            if room < 1:
                raise ValueError(f"num_bytes: expected at most the buffer's size, got {num_bytes}")
            needed = rotation_length(num_bytes, l2_size=self._l2)
            if room < needed:
                raise ValueError(
                    f"buffer: expected {needed} x {num_bytes} bytes for a cold rotation, got room for {room}"
                )
            variants = max(needed, min(room, 2))
            times_us = []
            for shape in STREAM_SHAPES:
                def read(i: int, shape: tuple[int, ...] = shape) -> None:
                    self.launch(num_bytes, offset=i * num_bytes, launch_shape=shape)

                times_us.append(graph_time_us(read, variants=variants, repeats=repeats).median_us)
            self._known[num_bytes] = min(times_us)
        return self._known[num_bytes]

    def flush(self) -> None:
        """Leaves the L2 holding only bytes from the buffer's end."""
        size = self._buffer.numel() * self._buffer.element_size()
        num_bytes = min(size, COLD_FACTOR * self._l2)
        self.launch(num_bytes, offset=(size - num_bytes) // 16 * 16)


def stream_limit_us(num_bytes: int) -> float:
    """The streaming limit over a buffer of its own; for many sizes keep one StreamLimit instead."""
    import torch

    size = max(num_bytes * rotation_length(num_bytes, l2_size=l2_bytes()), 2 * num_bytes)
    buffer = torch.empty(size // 2 + 8, dtype=torch.float16, device="cuda")
    for chunk in buffer.split(2**30):
        chunk.normal_()
    return StreamLimit(buffer).time_us(num_bytes)
