"""Decode steps of so many rows of so many tokens against the rate at which the GPU streams; their kernels."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from pkvsim.reports.grid import Column, print_grid

if TYPE_CHECKING:
    from gpu.serve.llm import LLM
    from gpu.serve.server import Request, Server

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


def streaming_rate() -> float:
    """GB/s of a kernel that only reads, over a buffer too large for any cache."""
    import torch

    from gpu.measure.timing import StreamLimit

    room = min(STREAM_BYTES, torch.cuda.mem_get_info()[0] // 2) // 16 * 16
    buffer = torch.empty(room // 2, dtype=torch.float16, device="cuda")
    for part in buffer.split(1 << 30):  # zeros stream faster than weights do
        part.normal_()
    rate = room / StreamLimit(buffer).time_us(room) / 1e3
    del buffer
    torch.cuda.empty_cache()
    return rate


def new_tokens(rows: int, context: int, steps: int, *, step_tokens: int) -> int:
    """Of each request, such that the first still decodes when all have done so for `steps` timed steps."""
    # Prompts have of a step what the rows that decode already leave of it; one step more is the first of all rows.
    prompt_steps = rows * (context // (step_tokens - rows + 1) + 1)
    return prompt_steps + 1 + SKIPPED + steps


def longest(cells: Sequence[tuple[int, int]], steps: int, *, step_tokens: int) -> int:
    """Most tokens that a request of these cells (rows, context) has with what it generates."""
    return max(context + new_tokens(rows, context, steps, step_tokens=step_tokens) for rows, context in cells)


def lacks_room(llm: LLM, rows: int, context: int, steps: int) -> str | None:
    """Why the cell's rows cannot all decode at once, None where they can."""
    server, limits = llm.server, llm.server.scheduler.limits
    tokens = context + new_tokens(rows, context, steps, step_tokens=llm.options.step_tokens)
    needed, room = rows * -(-tokens // limits.page_size), limits.num_pages - limits.keep_free
    if needed > room:
        return f"it takes {needed:,} KV pages, of which there are {room:,} beside the weights"
    if tokens > server.max_context:
        return (f"its requests have {tokens:,} tokens with what they generate, and {llm.config.name} is served with at "
                f"most {server.max_context:,}")
    return None


class CellError(ValueError):
    """A cell whose rows did not all decode at once, or not for long enough."""


def fill(llm: LLM, rows: int, context: int, steps: int) -> None:
    """Adds rows and runs their prompts, until all of them decode. Raises CellError, with no request left, where one
    ends before that or is refused."""
    from gpu.serve.server import ENDED
    from gpu.serve.step import SamplingParams

    server = llm.server
    rng = np.random.default_rng(0)
    tokens = new_tokens(rows, context, steps, step_tokens=llm.options.step_tokens)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [server.add_request(rng.integers(0, llm.config.vocab_size, context), params) for _ in range(rows)]
    while not server.steps or server.steps[-1].decode_rows < rows:
        if any(request.status in ENDED for request in requests):
            most = max((step.decode_rows for step in server.steps), default=0)
            drain(server)
            raise CellError(f"expected {rows} rows to decode at once, got at most {most}: {_what_ended(requests)}")
        server.step()


def _what_ended(requests: Sequence[Request]) -> str:
    """How the first of them that has ended did so, cancelled ones aside unless there are no others."""
    from gpu.serve.server import CANCELLED, ENDED

    ended = [request for request in requests if request.status in ENDED]
    first = next((request for request in ended if request.status != CANCELLED), ended[0])
    why = f" ({first.reason})" if first.reason else ""
    given = f"{len(first.tokens):,} of {first.params.max_tokens:,} tokens"
    return f"request {first.id} was {first.status}{why} after {given}"


def drain(server: Server) -> None:
    for request in server.unfinished():
        server.cancel(request)
    while server.has_work:
        server.step()
    server.steps.clear()


def measure(llm: LLM, rows: int, context: int, *, steps: int, rate: float) -> CellResult:
    from gpu.serve.attention import page_bytes

    server = llm.server
    fill(llm, rows, context, steps)
    server.steps.clear()
    while len(server.steps) < steps + SKIPPED and server.has_work:
        server.step()
    timed = [step for step in server.steps if step.kind == "decode" and step.decode_rows == rows][SKIPPED:]
    if len(timed) < 2:
        drain(server)
        raise CellError(f"expected 2 or more steps in which {rows} rows decode after the first {SKIPPED} of them, got "
                        f"{len(timed)} of {steps}")
    pairs = list(zip(timed, timed[1:]))
    device = [step.end_us - step.start_us for step in timed]
    gaps = [two.start_us - one.end_us for one, two in pairs]
    tokens = statistics.fmean(step.context_tokens for step in timed)
    kv = tokens * page_bytes(llm.config, page_size=1, kv_dtype=llm.pages.dtype)
    result = CellResult(
        rows=rows, context=context, step_us=statistics.median(two.end_us - one.end_us for one, two in pairs),
        device_us=statistics.median(device), gap_us=statistics.fmean(gaps),
        gap_share=sum(gaps) / (sum(gaps) + sum(device)), plan_us=statistics.median(step.plan_us for step in timed),
        limit_us=(llm.weights.step_bytes + kv) / rate / 1e3, steps=len(timed),
    )  # fmt: skip
    drain(server)
    return result


def profile(llm: LLM, rows: int, context: int, steps: int) -> None:
    """Prints what a decode step's time goes to, kernel by kernel, as CUPTI sees it. steps: that the cell has room for,
    of which few are profiled."""
    import torch
    from torch.profiler import ProfilerActivity

    server = llm.server
    fill(llm, rows, context, steps)
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


def show(console: Console, results: list[CellResult]) -> None:
    columns = [Column(name) for name in ("rows", "tokens", "step", "of it\nidle", "limit", "x limit", "tokens/s",
                                         "host\nplans")]
    print_grid(console, columns, [
        (f"{r.rows}", f"{r.context:,}", f"{r.step_us / 1e3:.3f} ms", f"{r.gap_share:.1%}", f"{r.limit_us / 1e3:.3f} ms",
         f"{r.over_limit:.3f}", f"{r.rows / r.step_us * 1e6:,.0f}", f"{r.plan_us:.0f} us") for r in results])
