"""Measures a DeviceSpec's own numbers: bandwidth, what one CTA reads, launches and graphs, arithmetic."""
from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu.kernels.compile import load_kernel
from gpu.kernels.this_gpu import this_gpu
from gpu.measure.environment import gpu_slug
from gpu.measure.timing import (
    StreamLimit,
    capture,
    graph_time_us,
    l2_bytes,
    rotation_length,
    shared_stream,
    wall_time_us,
)
from pkvsim.devices.device import DeviceSpec, NumberSource

if TYPE_CHECKING:
    import torch

MB = 10**6
STREAM_MB = (1, 4, 16, 64, 256, 1024)
QUICK_STREAM_MB = (4, 64, 1024)
CTA_READ_MB = 16
STARVED_MB = 256
STARVED_SHARE = 0.95  # of beta, above which CTAs per SM count as enough
FEW_LOADS = (256, 4)  # threads and 16-byte loads in flight of a CTA that must share its SM to reach beta
MATRIX = 8192
LAUNCHES = 500


@dataclass(frozen=True, slots=True)
class MeasuredConstants:
    """GB = 1e9 bytes. stream_us: time of a cold read by megabytes (1e6 bytes)."""

    stream_us: dict[int, float]
    beta_gb_s: float
    cta_read_gb_s: float
    min_ctas_per_sm: float
    launch_us: float  # host time of one launch
    eager_sync_us: float  # launch a small kernel and synchronise
    graph_replay_us: float  # replay a graph of that one kernel and synchronise
    graph_kernel_us: float  # a further small kernel inside a graph
    fp16_tflops: float


class _Reader:
    """The streaming kernel in any launch shape."""

    def __init__(self, buffer: torch.Tensor) -> None:
        import torch

        self._buffer = buffer
        self._sink = torch.zeros(1, dtype=torch.int32, device=buffer.device)
        self._kernels: dict[tuple[int, int], object] = {}

    def read(self, num_bytes: int, *, offset: int, ctas: int, threads: int, unroll: int) -> None:
        """Reads buffer bytes [offset, offset + num_bytes) on torch's current stream."""
        import torch

        if (threads, unroll) not in self._kernels:
            self._kernels[threads, unroll] = load_kernel(
                "stream.cu", "pkv_stream_read", {"UNROLL": unroll}, threads=threads
            )
        args = self._buffer.data_ptr() + offset, num_bytes // 16, self._sink.data_ptr()
        self._kernels[threads, unroll](ctas, args, torch.cuda.current_stream().cuda_stream)

    def gb_s(self, num_bytes: int, *, ctas: int, threads: int, unroll: int) -> float:
        """Cold, inside a CUDA graph."""
        room = self._buffer.numel() * self._buffer.element_size() // num_bytes
        variants = min(room, max(2, rotation_length(num_bytes, l2_size=l2_bytes())))
        timing = graph_time_us(
            lambda i: self.read(num_bytes, offset=i * num_bytes, ctas=ctas, threads=threads, unroll=unroll),
            variants=variants,
            repeats=3,
        )
        return num_bytes / timing.median_us / 1e3


def measure_constants(
    pool: torch.Tensor, limit: StreamLimit, *, quick: bool, say: Callable[[str], None]
) -> MeasuredConstants:
    """pool: a flat tensor of random values, of a gigabyte at least. say: told what is under way."""
    num_sms = this_gpu().num_sms
    pool_bytes = pool.numel() * pool.element_size()
    say("streaming bandwidth")
    sizes = [mb for mb in (QUICK_STREAM_MB if quick else STREAM_MB) if 2 * mb * MB + 4 * l2_bytes() <= pool_bytes]
    stream = {mb: limit.time_us(mb * MB) for mb in sizes}
    beta = max(mb * MB / us / 1e3 for mb, us in stream.items())
    say("what one CTA reads")
    reader = _Reader(pool)
    alone = max(
        reader.gb_s(CTA_READ_MB * MB, ctas=1, threads=threads, unroll=unroll)
        for threads, unroll in ((512, 8), (1024, 4), (1024, 8))
    )
    say("CTAs per SM that reach the bandwidth")
    threads, unroll = FEW_LOADS
    enough = next(
        (
            per_sm
            for per_sm in (1, 2, 3, 4, 6, 8)
            if reader.gb_s(STARVED_MB * MB, ctas=per_sm * num_sms, threads=threads, unroll=unroll)
            >= STARVED_SHARE * beta
        ),
        8,
    )
    say("launches and graphs")

    def small() -> None:
        reader.read(16 * 32, offset=0, ctas=1, threads=32, unroll=1)

    with shared_stream():
        small()
        graph = capture(small)
        launch_us = _launch_us(small)
        eager_us, replay_us = wall_time_us(small, 50), wall_time_us(graph.replay, 50)
    in_graph_us = graph_time_us(lambda _: small(), variants=200).median_us
    say("dense FP16 arithmetic")
    return MeasuredConstants(
        stream_us=stream,
        beta_gb_s=beta,
        cta_read_gb_s=alone,
        min_ctas_per_sm=enough,
        launch_us=launch_us,
        eager_sync_us=eager_us,
        graph_replay_us=replay_us,
        graph_kernel_us=in_graph_us,
        fp16_tflops=_fp16_tflops(),
    )


def _launch_us(launch: Callable[[], None]) -> float:
    """Median host time of a launch, the queue never full."""
    import torch

    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            launch()
        times.append((time.perf_counter() - start) * 1e6 / LAUNCHES)
    torch.cuda.synchronize()
    return statistics.median(times)


def _fp16_tflops() -> float:
    import torch

    a, b = torch.randn(2, MATRIX, MATRIX, device="cuda").half()
    out = torch.empty_like(a)
    timing = graph_time_us(lambda _: torch.mm(a, b, out=out), variants=1)
    return 2 * MATRIX**3 / timing.median_us / 1e6


def device_spec(measured: MeasuredConstants, *, environment: dict[str, str], name: str | None = None) -> DeviceSpec:
    """The GPU at hand as a DeviceSpec without routes: what the driver states and what was measured."""
    import cupy
    import torch

    gpu, device = this_gpu(), cupy.cuda.Device()
    properties = torch.cuda.get_device_properties(device.id)
    attributes = device.attributes
    peak = 2 * attributes["MemoryClockRate"] * 1e3 * attributes["GlobalMemoryBusWidth"] / 8 / 1e9
    driver = NumberSource("datasheet", f"what driver {environment['driver']} states")
    run = NumberSource("calibrated", calibration_source(environment))
    stated = {
        "compute_capability": divmod(gpu.compute_capability, 10),
        "num_sms": gpu.num_sms,
        "memory_gib": round(gpu.memory_bytes / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 2),
        "smem_per_sm_kib": attributes["MaxSharedMemoryPerMultiprocessor"] / 2**10,
        "peak_gb_s": round(peak, 1),
    }
    if not peak:  # some virtual GPUs: the bandwidth on paper is not to be had
        stated["peak_gb_s"] = measured.beta_gb_s
        driver = NumberSource(
            "datasheet", f"{driver.source}; peak_gb_s is the measured bandwidth, no memory clock is stated"
        )
    return spec_of(
        stated, measured, driver=driver, run=run, label=environment["gpu"], name=name or gpu_slug(environment["gpu"])
    )


def spec_of(
    stated: dict[str, object],
    measured: MeasuredConstants,
    *,
    driver: NumberSource,
    run: NumberSource,
    label: str,
    name: str,
) -> DeviceSpec:
    """Puts a DeviceSpec together, each number with its source."""
    numbers = {
        field: float(f"{getattr(measured, field):.4g}")
        for field in ("beta_gb_s", "cta_read_gb_s", "min_ctas_per_sm", "launch_us", "fp16_tflops")
    }
    sources = {**dict.fromkeys(stated, driver), **dict.fromkeys(numbers, run)}
    return DeviceSpec(name=name, label=label, sources=sources, **stated, **numbers)


def calibration_source(environment: dict[str, str]) -> str:
    """From which command, when and on what: the source that every calibrated number names."""
    versions = ", ".join(f"{part} {environment[part]}" for part in ("driver", "cuda", "cupy", "torch", "flashinfer"))
    command = re.sub(r"\s+", " ", environment["command"])
    return f"{command}, {environment['date']}, {environment['gpu']}, {versions}"
