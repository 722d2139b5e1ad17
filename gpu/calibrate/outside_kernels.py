"""What a step does outside paged decode attention, kernel by kernel: each cell a shape, each measurement a time.

Everything runs on `device`: "cuda" is timed by events inside CUDA graphs, on weights that are cold in L2; "cpu" is for
tests of the logic, by the wall clock. A kernel that this PyTorch or GPU lacks is noted and left out.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gpu.calibrate.outside_attention import Heads, chunk_attention, runs
from pkvsim.fitting.outside_table import ALL_REDUCE, ATTENTION, ELEMENTWISE, HEAT, HOST, MATRIX, SAMPLING, KernelTime

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]
# What a kernel that this PyTorch, FlashInfer or GPU lacks, or has no memory for, ends in.
FAILURES = (RuntimeError, AttributeError, NotImplementedError, ImportError, OSError, TypeError, ValueError)
# (out, in) features: Llama-3.1-8B's products and its LM head, then the 70B's on one of four GPUs.
SHAPES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (2560, 8192), (8192, 2048),
    (14336, 8192), (8192, 7168),
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
CHUNKS, PASTS = (256, 512, 1024, 2048, 4096, 8192), (0, 2048, 8192, 32768, 65536)
ATTENTION_HEADS = (32, 8, 128)  # query heads, KV heads, head_dim
HIDDEN, MLP_WIDTH, VOCABULARY = 4096, 14336, 128256
SAMPLED_ROWS = (1, 8, 64, 256)
REDUCED_BYTES = tuple(2**power for power in range(13, 28, 2))
FP8_TOKENS_MULTIPLE = 16  # torch._scaled_mm takes no others
HEAT_MATRIX, HEAT_CALLS = 8192, 400
MOST_COPIES_BYTES = 4 << 30  # of a product's weights, for cold reads


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; tests take small ones."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    chunks: tuple[int, ...] = CHUNKS
    pasts: tuple[int, ...] = PASTS
    heads: tuple[int, int, int] = ATTENTION_HEADS
    hidden: int = HIDDEN
    mlp_width: int = MLP_WIDTH
    vocabulary: int = VOCABULARY
    sampled_rows: tuple[int, ...] = SAMPLED_ROWS
    heat_matrix: int = HEAT_MATRIX
    heat_calls: int = HEAT_CALLS


TINY = Sizes(
    shapes=((64, 32), (48, 64)), tokens=(1, 3, 16), chunks=(8, 16), pasts=(0, 16), heads=(4, 2, 16), hidden=32,
    mlp_width=64, vocabulary=128, sampled_rows=(1, 4), heat_matrix=32, heat_calls=6,
)  # fmt: skip


def call_us(run: Callable[[int], Any], *, device: str, variants: int = 1, repeats: int = 3) -> float:
    """Median time of run(i), i going round range(variants)."""
    if device != "cpu":
        from gpu.measure.timing import graph_time_us

        return graph_time_us(run, variants=variants, repeats=repeats).median_us
    times = []
    for index in range(repeats + 1):
        start = time.perf_counter()
        run(index % variants)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[1:])


def _copies(num_bytes: int, device: str) -> int:
    """How many weights to go round so that none is found in L2."""
    if device == "cpu":
        return 2
    from gpu.measure.timing import l2_bytes, rotation_length

    return max(1, min(rotation_length(num_bytes, l2_size=l2_bytes()), MOST_COPIES_BYTES // num_bytes))


def _tried(what: str, say: Say, measure: Callable[[], KernelTime]) -> Iterator[KernelTime]:
    """One measurement, or a note why there is none: another kernel's times are worth having without it."""
    try:
        yield measure()
    except FAILURES as error:
        say(f"left out {what}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")


def matrix_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """Products of [tokens, in] by [in, out] in FP16, and in FP8 where the GPU has it."""
    import torch

    for out, into in sizes.shapes:
        copies = _copies(2 * out * into, device)
        weights = [torch.randn(out, into, device=device, dtype=torch.float16) for _ in range(copies)]
        for tokens in sizes.tokens:
            if out == sizes.vocabulary and tokens > 1024:
                continue  # logits are computed for one token a row
            x = torch.randn(tokens, into, device=device, dtype=torch.float16)

            def measure(x: torch.Tensor = x, weights: list[torch.Tensor] = weights, tokens: int = tokens) -> KernelTime:
                us = call_us(lambda i: torch.mm(x, weights[i].t()), device=device, variants=len(weights))
                return KernelTime(MATRIX, "16-bit", tokens=tokens, out_features=out, in_features=into, us=us)

            yield from _tried(f"16-bit {tokens} x {into} x {out}", say, measure)
        if _has_fp8(device):
            yield from _fp8_times(weights, sizes, device=device, say=say)
        del weights


def _has_fp8(device: str) -> bool:
    import torch

    return device != "cpu" and torch.cuda.get_device_capability() >= (8, 9) and hasattr(torch, "_scaled_mm")


def _fp8_times(weights: list[torch.Tensor], sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    import torch

    out, into = weights[0].shape
    narrow = [weight.to(torch.float8_e4m3fn) for weight in weights]
    one = torch.ones((), device=device, dtype=torch.float32)
    seen = set()
    for tokens in sizes.tokens:
        padded = -(-tokens // FP8_TOKENS_MULTIPLE) * FP8_TOKENS_MULTIPLE
        if padded in seen or (out == sizes.vocabulary and tokens > 1024):
            continue
        seen.add(padded)
        x = torch.randn(padded, into, device=device).to(torch.float8_e4m3fn)

        def measure(x: torch.Tensor = x, padded: int = padded) -> KernelTime:
            def run(i: int) -> torch.Tensor:
                return torch._scaled_mm(x, narrow[i].t(), scale_a=one, scale_b=one, out_dtype=torch.float16)

            us = call_us(run, device=device, variants=len(narrow))
            return KernelTime(MATRIX, "fp8", tokens=padded, out_features=out, in_features=into, us=us)

        yield from _tried(f"FP8 {padded} x {into} x {out}", say, measure)


def attention_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """Causal attention of chunks behind what is cached, one layer."""
    import torch

    heads = Heads(*sizes.heads)
    kernel = runs(chunk_attention, heads=heads, device=device, say=say)
    for chunk in sizes.chunks:
        for past in sizes.pasts:
            def measure(chunk: int = chunk, past: int = past) -> KernelTime:
                attend = chunk_attention(chunk, past, heads, layers=1, device=device, kernel=kernel)
                q = torch.randn(chunk, heads.query, heads.dim, device=device, dtype=torch.float16)
                us = call_us(lambda _: attend(0, q), device=device)
                return KernelTime(ATTENTION, kernel, tokens=chunk, past=past, us=us)

            yield from _tried(f"attention of {chunk} behind {past}", say, measure)


def elementwise_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """Norms, residual sums and activations: time and bytes moved."""
    import torch
    from torch.nn.functional import rms_norm, silu

    weight = torch.ones(sizes.hidden, device=device, dtype=torch.float16)
    for tokens in sizes.tokens:
        x, y = torch.randn(2, tokens, sizes.hidden, device=device, dtype=torch.float16)
        wide = torch.randn(tokens, 2 * sizes.mlp_width, device=device, dtype=torch.float16)
        gate, up = wide.chunk(2, dim=1)
        kernels: dict[str, tuple[Callable[[int], Any], int]] = {
            "rms_norm": (lambda _: rms_norm(x, (sizes.hidden,), weight), 2 * x.numel()),
            "add": (lambda _: torch.add(x, y), 3 * x.numel()),
            "silu_mul": (lambda _: silu(gate) * up, 5 * gate.numel()),
        }
        for name, (run, elements) in kernels.items():
            def measure(
                name: str = name, run: Callable[[int], Any] = run, elements: int = elements, tokens: int = tokens
            ) -> KernelTime:
                us = call_us(run, device=device)
                return KernelTime(ELEMENTWISE, name, tokens=tokens, bytes=2 * elements, us=us)

            yield from _tried(f"{name} of {tokens}", say, measure)


def sampling_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """Greedy choice and a draw from the softmax, by rows."""
    import torch

    for rows in sizes.sampled_rows:
        logits = torch.randn(rows, sizes.vocabulary, device=device)

        def draw(_: int, logits: torch.Tensor = logits) -> torch.Tensor:
            # The exponential trick, as engines sample: a multinomial draw would wait for the host.
            noise = torch.empty_like(logits).exponential_()
            return (logits.softmax(-1) / noise).argmax(-1)

        for name, run in (("greedy", lambda _, logits=logits: logits.argmax(-1)), ("draw", draw)):
            def measure(name: str = name, run: Callable[[int], Any] = run, rows: int = rows) -> KernelTime:
                us = call_us(run, device=device)
                return KernelTime(SAMPLING, name, tokens=rows, bytes=4 * rows * sizes.vocabulary, us=us)

            yield from _tried(f"sampling {name} of {rows}", say, measure)


def heat_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """One large product again and again after a rest: `past` is the busy time so far in us, `us` that of the call."""
    import torch

    n = sizes.heat_matrix
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float16)
    torch.mm(a, b)
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(sizes.heat_calls):
            begun = time.perf_counter()
            torch.mm(a, b)
            busy = round((begun - start) * 1e6)
            us = (time.perf_counter() - begun) * 1e6
            yield KernelTime(HEAT, "16-bit", tokens=n, out_features=n, in_features=n, past=busy, us=us)
        return
    torch.cuda.synchronize()
    time.sleep(1.0)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(sizes.heat_calls + 1)]
    out = torch.empty_like(a)
    marks[0].record()
    for mark in marks[1:]:
        torch.mm(a, b, out=out)
        mark.record()
    torch.cuda.synchronize()
    busy_us = 0.0
    for before, after in zip(marks, marks[1:]):
        us = before.elapsed_time(after) * 1e3
        yield KernelTime(HEAT, "16-bit", tokens=n, out_features=n, in_features=n, past=round(busy_us), us=us)
        busy_us += us


def host_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """What the host needs: one eager launch, and to replay a graph and wait for it."""
    import torch

    x = torch.zeros(16, device=device)
    calls = 500 if device != "cpu" else 5
    times = []
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            x.add_(1.0)
        times.append((time.perf_counter() - start) * 1e6 / calls)
    yield KernelTime(HOST, "eager_launch", us=statistics.median(times))
    if device != "cpu":
        from gpu.measure.timing import capture, shared_stream, wall_time_us

        with shared_stream():
            graph = capture(lambda: x.add_(1.0))
            yield KernelTime(HOST, "graph_replay", us=wall_time_us(graph.replay, 50))


def all_reduce_times(sizes: Sizes, *, device: str, say: Say) -> Iterator[KernelTime]:
    """NCCL's sums over 2, 4 .. all GPUs of this process; nothing where there is one GPU."""
    import torch

    count = torch.cuda.device_count() if device != "cpu" else 0
    ranks = 2
    while ranks <= count:
        for num_bytes in REDUCED_BYTES:
            def measure(ranks: int = ranks, num_bytes: int = num_bytes) -> KernelTime:
                import torch.cuda.nccl as nccl

                parts = [torch.zeros(num_bytes // 2, device=f"cuda:{at}", dtype=torch.float16) for at in range(ranks)]
                us = _reduce_us(lambda: nccl.all_reduce(parts), ranks)
                return KernelTime(ALL_REDUCE, "nccl", tokens=ranks, bytes=num_bytes, us=us)

            yield from _tried(f"all-reduce of {num_bytes} over {ranks}", say, measure)
        ranks *= 2


def _reduce_us(reduce: Callable[[], None], ranks: int, calls: int = 20) -> float:
    import torch

    def wait() -> None:
        for at in range(ranks):
            torch.cuda.synchronize(at)

    times = []
    for _ in range(4):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            reduce()
        wait()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    return statistics.median(times[1:])


PARTS: dict[str, Callable[..., Iterator[KernelTime]]] = {
    "host": host_times, "matrices": matrix_times, "attention": attention_times, "elementwise": elementwise_times,
    "sampling": sampling_times, "all-reduce": all_reduce_times, "heat": heat_times,
}  # fmt: skip
COLUMNS = tuple(field.name for field in fields(KernelTime))
