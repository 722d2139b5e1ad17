"""Requests that an engine serves: cases of a CSV file at their arrivals, and a mix of drawn lengths."""
from __future__ import annotations

import csv
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MIX_ROWS = (1, 4, 16, 48, 120)  # requests that a mix keeps running, each for a while
MIX_TOKENS, MIX_OUTPUTS = (1, 60_000), (1, 400)  # of a request, drawn so that each power of ten is as likely
MIX_WAITING_TOKENS = 400_000  # prompt tokens that a mix has in the engine at most
MIX_SECONDS_PER_ROWS = 6.0
MIX_TOLD_S = 10.0  # after which what a mix has counted is written
MIX_ABORTED = 0.05  # of requests, after a drawn number of tokens


@dataclass(frozen=True, slots=True)
class Timed:
    """A request with its arrival, and what another run of it took where the file says so."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    tpot_ms: float | None = None
    e2e_s: float | None = None


def read_cases(path: Path) -> dict[str, list[Timed]]:
    """Requests by the column `case`; bench_vllm names the others."""
    cases: dict[str, list[Timed]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            measured = (float(row[name]) if row.get(name) else None
                        for name in ("measured_ttft_s", "measured_tpot_ms", "measured_e2e_s"))
            lengths = int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])
            cases.setdefault(row["case"], []).append(Timed(float(row["arrived_at"]), *lengths, *measured))
    return {name: sorted(requests, key=lambda request: request.arrived_s) for name, requests in cases.items()}


def summary(requests: Sequence[Timed]) -> dict[str, float] | None:
    """Throughput and mean latencies of requests that were measured, None where one was not."""
    if any(request.ttft_s is None or request.e2e_s is None for request in requests):
        return None
    wall = max(request.arrived_s + request.e2e_s for request in requests)
    tpots = [request.tpot_ms for request in requests if request.tpot_ms is not None and request.output_tokens > 1]
    return {"wall_s": wall, "tokens_per_s": sum(request.output_tokens for request in requests) / wall,
            "ttft_mean_s": statistics.fmean(request.ttft_s for request in requests),
            "tpot_mean_ms": statistics.fmean(tpots) if tpots else 0.0,
            "tpot_p50_ms": statistics.median(tpots) if tpots else 0.0}


def prompt(length: int, row: int, vocabulary: int = 100_000) -> dict[str, list[int]]:
    ids = 1000 + (row * 7919 + np.arange(length, dtype=np.int64) * 104_729) % (vocabulary - 1000)
    return {"prompt_token_ids": ids.tolist()}


def sampling(tokens: int) -> Any:
    """Exactly so many greedy tokens, handed over step by step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0,
                          output_kind=RequestOutputKind.DELTA)


def serve_case(engine: Any, requests: Sequence[Timed], ids: Iterator[int], until: float) -> dict[str, Any]:
    """Serves requests at their arrivals, by the clock, and returns what `summary` does of them and of the file's.

    `complete` is False where time.monotonic() passed `until` first, and then only the number of requests is returned.
    """
    prepared = deque((request, f"case-{next(ids)}", prompt(request.prompt_tokens, number))
                     for number, request in enumerate(requests))
    known = {row: request for request, row, _ in prepared}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    counts = dict.fromkeys(known, 0)
    begin = time.perf_counter()
    while prepared or engine.has_unfinished_requests():
        now = time.perf_counter() - begin
        while prepared and prepared[0][0].arrived_s <= now:
            request, row, tokens = prepared.popleft()
            engine.add_request(row, tokens, sampling(request.output_tokens))
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, prepared[0][0].arrived_s - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            counts[output.request_id] += len(output.outputs[0].token_ids)
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
        if time.monotonic() > until:
            engine.abort_request([*known])
            _drain(engine)
            return {"requests": len(requests), "complete": False}
    wrong = [row for row, request in known.items() if counts[row] != request.output_tokens]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(known)} requests ended with another number of tokens, {wrong[0]} "
                           f"with {counts[wrong[0]]} of {known[wrong[0]].output_tokens}")
    own = [Timed(request.arrived_s, request.prompt_tokens, request.output_tokens, first[row] - request.arrived_s,
                 1e3 * (last[row] - first[row]) / max(1, request.output_tokens - 1), last[row] - request.arrived_s)
           for row, request in known.items()]
    return {"requests": len(requests), "complete": True, "own": summary(own), "reference": summary(requests)}


def warm(engine: Any, ids: Iterator[int]) -> None:
    """Four requests, so that what compiles at its first use has been used."""
    for number in range(4):
        engine.add_request(f"warm-{next(ids)}", prompt(2500, number), sampling(11))
    _drain(engine)


def mix(engine: Any, seconds: float, ids: Iterator[int], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Serves drawn lengths for so many seconds, rows coming, ending and being aborted all the time: yields what has
    been counted every MIX_TOLD_S, and at the end.

    Every request that is not aborted must end with the tokens that it asked for, all of them ids of the vocabulary.
    """
    rng = np.random.default_rng(seed)
    asked: dict[str, tuple[int, int, int]] = {}  # by row: prompt tokens, tokens asked for, tokens after which it goes
    made: dict[str, int] = {}
    found = {"seconds": 0.0, "steps": 0, "finished": 0, "aborted": 0, "prompt_tokens": 0, "tokens": 0, "most_rows": 0,
             "longest": 0, "wrong": 0}
    begin, told = time.perf_counter(), 0.0
    while (now := time.perf_counter() - begin) < seconds:
        if now > told + MIX_TOLD_S:
            told = found["seconds"] = now
            yield found
        rows = MIX_ROWS[int(now / MIX_SECONDS_PER_ROWS) % len(MIX_ROWS)]
        while len(asked) < rows and sum(tokens for tokens, _, _ in asked.values()) < MIX_WAITING_TOKENS:
            length, outputs = (int(np.exp(rng.uniform(*np.log(span)))) for span in (MIX_TOKENS, MIX_OUTPUTS))
            row = f"mix-{next(ids)}"
            leaves = int(rng.integers(0, outputs)) if rng.random() < MIX_ABORTED else outputs + 1
            asked[row], made[row] = (length, outputs, leaves), 0
            engine.add_request(row, prompt(length, int(rng.integers(1 << 20))), sampling(outputs))
            found["prompt_tokens"] += length
            found["longest"] = max(found["longest"], length)
        found["most_rows"] = max(found["most_rows"], len(asked))
        for output in engine.step():
            row, tokens = output.request_id, output.outputs[0].token_ids
            if row not in asked:
                continue
            made[row] += len(tokens)
            found["tokens"] += len(tokens)
            found["wrong"] += any(not 0 <= token < 1 << 20 for token in tokens)
            _, outputs, leaves = asked[row]
            if output.finished:
                found["finished"] += 1
                found["wrong"] += made[row] != outputs
            elif made[row] >= leaves:
                engine.abort_request([row])
                found["aborted"] += 1
            else:
                continue
            del asked[row]
        found["steps"] += 1
    found["seconds"] = time.perf_counter() - begin
    engine.abort_request([*asked])
    _drain(engine)
    yield found


def _drain(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.step()
