"""Serving on one GPU: decode steps against the memory's limit, and what whatif predicts of whole runs.

    python examples/bench_serve.py                                        # rows x context against the roofline
    python examples/bench_serve.py --profile --cells 1x1024,32x1024       # which kernels a decode step consists of
    python examples/bench_serve.py --model llama-3.2-1b --dtype bfloat16 --json serve.json

The limit of a step is the bytes that it must read, weights and KV, over the rate at which this GPU streams. Weights are
random, of the model's shape.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpu.measure.environment import environment, lacks_gpu, write_json
from pkvsim.reports.grid import Column, print_grid, print_line, table_console

CELLS = "1x1024,8x1024,32x1024,128x1024,1x32768,8x32768"
SKIPPED = 8  # decode steps of a cell before its first timed one
STREAM_BYTES = 8 << 30
PROFILED_STEPS = 4


@dataclass(frozen=True, slots=True)
class CellResult:
    """Decode steps of so many rows of about so many tokens, in us."""

    rows: int
    context: int
    step_us: float  # median, from the end of a step to the next one's
    device_us: float  # median, from its begin to its end
    gap_us: float  # mean, between them
    gap_share: float
    plan_us: float  # median, of the host
    limit_us: float
    steps: int

    @property
    def over_limit(self) -> float:
        return self.step_us / self.limit_us


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a preset of pkvsim, or a config.json")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--kv-dtype", help="float8_e4m3fn, float8_e5m2 or int8; by default the model's")
    parser.add_argument("--cells", default=CELLS, help="rows x tokens of their prompts, comma-separated")
    parser.add_argument("--steps", type=int, default=100, help="decode steps of a cell")
    parser.add_argument("--rate", type=float, help="GB/s that the GPU streams; measured by default")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="the kernels of a decode step in place of times")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if lacks_gpu("bench_serve"):
        return 1
    cells = [tuple(map(int, cell.split("x"))) for cell in args.cells.split(",")]
    from gpu.serve.llm import LLM, ServeOptions

    rate = args.rate or streaming_rate()
    console = table_console()
    most = max(context for _, context in cells) + args.steps + 16
    llm = LLM(args.model, ServeOptions(dtype=args.dtype, kv_dtype=args.kv_dtype, dummy_weights=True, max_context=most,
                                       max_batch=max(rows for rows, _ in cells), step_tokens=4096,
                                       graphs=not args.eager), record=True,
              say=lambda line: print(line, file=sys.stderr))
    print_line(console, f"{llm.config.name}, {args.dtype}, cache {llm.pages.dtype}: {llm.weights.step_bytes / 1e9:.2f} "
                        f"GB of weights a step, {rate:,.0f} GB/s; prompt chunks by {llm.prefill}")
    results = []
    for rows, context in cells:
        if args.profile:
            profile(llm, rows, context)
            continue
        results.append(measure(llm, rows, context, steps=args.steps, rate=rate))
        r = results[-1]
        print(f"  {rows} x {context}: {r.step_us:.0f} us, limit {r.limit_us:.0f}, {r.over_limit:.3f} x, gap "
              f"{r.gap_us:.1f} us, plan {r.plan_us:.0f} us", file=sys.stderr, flush=True)
    if results:
        show(console, results)
    if args.json:
        write_json(args.json, {"environment": environment(), "model": llm.config.name, "gb_per_s": rate,
                               "cells": [asdict(r) | {"over_limit": r.over_limit} for r in results]})
    return 0


def streaming_rate() -> float:
    """GB/s of a kernel that only reads, over a buffer too large for any cache."""
    import torch

    from gpu.measure.timing import StreamLimit

    room = min(STREAM_BYTES, torch.cuda.mem_get_info()[0] // 2) // 16 * 16
    buffer = torch.zeros(room, dtype=torch.uint8, device="cuda")
    rate = room / StreamLimit(buffer).time_us(room) / 1e3
    del buffer
    torch.cuda.empty_cache()
    return rate


def fill(llm, rows: int, context: int, steps: int) -> None:
    """Adds rows and runs their prompts, until all of them decode."""
    from gpu.serve.step import SamplingParams

    server = llm.server
    rng = np.random.default_rng(0)
    for _ in range(rows):
        server.add_request(rng.integers(0, llm.config.vocab_size, context), SamplingParams(
            max_tokens=steps + SKIPPED + rows * (context // llm.options.step_tokens + 1), ignore_eos=True))
    while not server.steps or server.steps[-1].decode_rows < rows:
        server.step()


def drain(server) -> None:
    for request in server.unfinished():
        server.cancel(request)
    while server.has_work:
        server.step()
    server.steps.clear()


def measure(llm, rows: int, context: int, *, steps: int, rate: float) -> CellResult:
    server = llm.server
    fill(llm, rows, context, steps)
    server.steps.clear()
    while len(server.steps) < steps + SKIPPED and server.has_work:
        server.step()
    timed = [step for step in server.steps if step.kind == "decode" and step.decode_rows == rows][SKIPPED:]
    pairs = list(zip(timed, timed[1:]))
    device = [step.end_us - step.start_us for step in timed]
    gaps = [two.start_us - one.end_us for one, two in pairs]
    tokens = statistics.fmean(step.context_tokens for step in timed)
    from gpu.serve.attention import page_bytes

    kv = tokens * page_bytes(llm.config, page_size=1, kv_dtype=llm.pages.dtype)
    result = CellResult(
        rows=rows, context=context, step_us=statistics.median(two.end_us - one.end_us for one, two in pairs),
        device_us=statistics.median(device), gap_us=statistics.fmean(gaps),
        gap_share=sum(gaps) / (sum(gaps) + sum(device)), plan_us=statistics.median(step.plan_us for step in timed),
        limit_us=(llm.weights.step_bytes + kv) / rate / 1e3, steps=len(timed),
    )  # fmt: skip
    drain(server)
    return result


def profile(llm, rows: int, context: int) -> None:
    """Prints what a decode step's time goes to, kernel by kernel, as CUPTI sees it."""
    import torch
    from torch.profiler import ProfilerActivity

    server = llm.server
    fill(llm, rows, context, 2 * PROFILED_STEPS + SKIPPED)
    for _ in range(4):
        server.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            server.step()
        torch.cuda.synchronize()
    print(f"{rows} x {context}, {PROFILED_STEPS} steps:")
    rows_of = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    for event in rows_of[:24]:
        print(f"  {event.device_time_total / PROFILED_STEPS:9.1f} us a step  {event.count / PROFILED_STEPS:7.1f} x "
              f"{event.device_time_total / max(1, event.count):8.2f} us  {event.key[:110]}")
    print(f"  {sum(event.device_time_total for event in rows_of) / PROFILED_STEPS:9.1f} us a step in all", flush=True)
    drain(server)


def show(console, results: list[CellResult]) -> None:
    columns = [Column(name) for name in ("rows", "tokens", "step", "of it\nidle", "limit", "x limit", "tokens/s",
                                         "host\nplans")]
    print_grid(console, columns, [
        (f"{r.rows}", f"{r.context:,}", f"{r.step_us / 1e3:.3f} ms", f"{r.gap_share:.1%}", f"{r.limit_us / 1e3:.3f} ms",
         f"{r.over_limit:.3f}", f"{r.rows / r.step_us * 1e6:,.0f}", f"{r.plan_us:.0f} us") for r in results])


if __name__ == "__main__":
    sys.exit(main())
