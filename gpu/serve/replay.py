"""A request trace served in real time: who sends what when is the simulator's own clients' matter."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu.serve.server import REFUSED, SERVED, Request, Server
from gpu.serve.step import SamplingParams, StepRecord
from pkvsim.devices.route_model import ROUTES
from pkvsim.memory.prefix_cache import no_blocks
from pkvsim.serving.queueing.clients import end, next_send_us, send
from pkvsim.serving.results.logs import RequestLog, StepLog, StepSample
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.results.summary import summarise
from pkvsim.serving.state import (
    GAP_BINS,
    GAPS_PER_E,
    LOG_COLUMNS,
    TOO_LONG_FOR_MODEL,
    TOO_LONG_FOR_POOL,
    Requests,
    new_clients,
)
from pkvsim.serving.state import SERVED as NOT_REJECTED
from pkvsim.traces.requests import RequestTrace

MEASURED = "measured"
WARM_UP_TOKENS = 8
LONGEST_SLEEP_S = 0.05  # between two looks at what is due
Progress = Callable[[int, int], None]  # output tokens, of how many


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A served trace. begin_us: of the runner's clock, when the trace's first request arrived."""

    trace: RequestTrace
    requests: list[Request]  # in the trace's order
    steps: list[StepRecord]
    begin_us: float


def prompt_of(trace: RequestTrace, request: int, vocab_size: int) -> np.ndarray:
    """Made-up token ids, int32: equal blocks of the trace have equal tokens, others do not."""
    length = int(trace.prompt_tokens[request])
    place = np.arange(length, dtype=np.uint64)
    if trace.block_hashes is None or trace.block_offsets is None:
        name = np.full(length, request, np.uint64)
    else:
        begin, end_ = trace.block_offsets[request : request + 2]
        size = np.uint64(trace.block_tokens)
        name = trace.block_hashes[begin:end_].astype(np.uint64)[(place // size).astype(np.int64)]
        place = place % size
    with np.errstate(over="ignore"):
        mixed = name * np.uint64(0x9E3779B97F4A7C15) + place * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(1)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0x94D049BB133111EB)
    return ((mixed >> np.uint64(33)) % np.uint64(vocab_size)).astype(np.int32)


def warm_up(server: Server, *, step_tokens: int) -> None:
    """Steps of every kind before any is timed: a long prompt, a short one beside a row that decodes."""
    if server.max_context < 2:
        return  # No request has both a prompt and an output then.
    output = min(WARM_UP_TOKENS, server.max_context - 1)
    longest = min(step_tokens + 16, server.max_context - output)
    for length in (longest, max(1, longest // 2), 1):
        server.add_request(np.zeros(length, np.int32), SamplingParams(max_tokens=output, ignore_eos=True))
        server.step()
    while server.has_work:
        server.step()
    if server.steps is not None:
        server.steps.clear()


def replay(server: Server, trace: RequestTrace, *, progress: Progress | None = None) -> Replay:
    """Serves the trace; each request gives as many tokens as it has there. The server records its steps."""
    if server.steps is None:
        raise ValueError("server: expected one that records its steps")
    prompts = [prompt_of(trace, at, server.vocab_size) for at in range(len(trace))]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in trace.output_tokens.tolist()]
    clients = new_clients(_work(trace))
    requests: list[Request | None] = [None] * len(trace)
    place_of: dict[int, int] = {}
    total, tokens = int(trace.output_tokens.sum()), 0
    clock, begin_us = server.runner.now_us, server.runner.now_us()
    while True:
        now_us = clock() - begin_us
        while (due_us := next_send_us(clients)) <= now_us:
            at = send(clients)
            request = server.add_request(prompts[at], params[at], arrival_us=begin_us + clients.sent_us[at])
            requests[at], place_of[request.id] = request, at
        if server.has_work:
            for event in server.step():
                tokens += len(event.tokens)
                if event.ended:
                    end(clients, place_of.pop(event.request.id), event.request.end_us - begin_us)
            if progress is not None:
                progress(tokens, total)
        elif due_us == math.inf:
            break
        else:
            time.sleep(min((due_us - now_us) / 1e6, LONGEST_SLEEP_S))
    return Replay(trace, [request for request in requests if request is not None], list(server.steps), begin_us)


def _work(trace: RequestTrace) -> Requests:
    """The trace as the clients take it; what cannot be served the server refuses."""
    n = len(trace)
    return Requests(
        arrival_us=(trace.arrival_s - trace.arrival_s[0]) * 1e6, prompt=trace.prompt_tokens,
        output=trace.output_tokens, rejected=np.zeros(n, np.int8), blocks=no_blocks(n), shared=np.zeros(n, np.int64),
        after=np.zeros(0, np.int32) if trace.after is None else trace.after,
        think_us=np.zeros(0) if trace.think_us is None else trace.think_us,
        concurrency=trace.concurrency or 0, rank=np.zeros(n),
    )  # fmt: skip


def as_result(run: Replay, server: Server) -> ServingResult:
    """The run as the simulator's results have it, so that whatever shows those shows it too. What was not measured, the
    parts of a step, is NaN there and None in the summary."""
    limits, requests = server.scheduler.limits, _request_log(run, server)
    steps = _step_log(run)
    totals = dict.fromkeys(LOG_COLUMNS, float("nan"))
    totals["duration_us"] = float(steps.duration_us.sum())
    decode_steps = int(np.count_nonzero(steps.decode_rows))
    routes = {"balanced": decode_steps}
    gaps = _gaps(run)
    work = _work(run.trace)
    summary = summarise(requests, steps, totals, {}, routes, limits, work, gaps, 1, decode_steps)
    for name in ("attention_share", "rest_share", "prefill_share", "attention_us_per_decode_step", "regret",
                 "prefix_hit_share"):
        summary[name] = None
    hits = requests.hit_tokens[requests.rejected == NOT_REJECTED].sum()
    if run.trace.block_hashes is not None:
        summary["prefix_hit_share"] = float(hits / max(1, run.trace.prompt_tokens.sum()))
    summary["replicas"], summary["shared_reads"], summary["selection"] = [], None, None
    nothing = np.zeros((0, limits.max_batch), np.int64)
    empty = np.zeros(0, np.int64)
    return ServingResult(
        policy=MEASURED, requests=requests, steps=steps, sample=StepSample(nothing, empty, empty, empty),
        num_pages=limits.num_pages, page_size=limits.page_size, allocated_pages=0, freed_pages=0, cached_pages=0,
        evicted_blocks=0, totals=totals, routes=routes, gaps=gaps, summary=summary,
    )  # fmt: skip


def _request_log(run: Replay, server: Server) -> RequestLog:
    requests = run.requests
    nan = float("nan")

    def times(values: list[float | None]) -> np.ndarray:
        """Seconds of the trace."""
        return np.array([nan if value is None else (value - run.begin_us) / 1e6 for value in values])

    hits = np.array([request.hit_tokens for request in requests], np.int64)
    arrival = times([request.arrival_us for request in requests])
    first = times([request.token_us[0] if request.token_us else None for request in requests])
    finish = times([request.end_us if request.status == SERVED else None for request in requests])
    counts = np.array([len(request.tokens) for request in requests], np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(counts > 1, (finish - first) / (counts - 1), np.nan)
    room = server.max_context
    rejected = [
        NOT_REJECTED if request.status != REFUSED
        else TOO_LONG_FOR_MODEL if len(request.prompt) + request.params.max_tokens > room else TOO_LONG_FOR_POOL
        for request in requests
    ]  # fmt: skip
    return RequestLog(
        arrival_s=arrival,
        queue_s=times([request.first_run_us for request in requests]) - arrival,
        ttft_s=first - arrival,
        tpot_s=tpot,
        finish_s=finish,
        prompt_tokens=np.array([len(request.prompt) for request in requests], np.int64),
        output_tokens=counts,
        hit_tokens=hits,
        hit_blocks=(hits // server.scheduler.limits.page_size).astype(np.int32),
        preemptions=np.array([request.preemptions for request in requests], np.int32),
        rejected=np.array(rejected, np.int8),
        replica=np.zeros(len(requests), np.int64),
    )


def _step_log(run: Replay) -> StepLog:
    steps = run.steps

    def column(name: str) -> np.ndarray:
        return np.array([getattr(step, name) for step in steps], np.float64)

    unknown = np.zeros(len(steps))
    routes = np.zeros((len(steps), len(ROUTES)))
    routes[:, ROUTES.index("balanced")] = column("decode_rows") > 0
    return StepLog(
        start_s=(column("start_us") - run.begin_us) / 1e6, steps=np.ones(len(steps), np.int64),
        duration_us=column("end_us") - column("start_us"), rows=column("running"), decode_rows=column("decode_rows"),
        prefill_tokens=column("prefill_tokens"), waiting=column("waiting"), pages=column("pages"),
        attention_us=unknown, rest_us=unknown, prefill_us=unknown, best_attention_us=unknown, route_steps=routes,
    )  # fmt: skip


def _gaps(run: Replay) -> np.ndarray:
    """Times between a request's tokens, counted as pkvsim.serving.state.RunLog.gaps."""
    apart = [np.diff(request.token_us) for request in run.requests if len(request.token_us) > 1]
    bins = np.zeros(GAP_BINS, np.int64)
    if apart:
        us = np.maximum(np.concatenate(apart), 1.0)
        np.add.at(bins, np.minimum(GAP_BINS - 1, (np.log(us) * GAPS_PER_E).astype(np.int64)), 1)
    return bins
