"""What a finished run left behind, as plain arrays: per request, per step, and some steps whole."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from pkvsim.serving.state import (
    ATTENTION,
    BEST,
    DECODE_ROWS,
    DURATION,
    LOG_FILL,
    LOG_STRIDE,
    LOG_USED,
    PAGES,
    PREFILL,
    PREFILL_TOKENS,
    REST,
    ROW_COUNT,
    SAMPLES,
    SAMPLES_USED,
    START,
    WAITING_COUNT,
    Requests,
    RunLog,
    SchedulerState,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RequestLog:
    """One entry a request [n], in trace order; NaN where it was rejected. Times are seconds from the first arrival."""

    arrival_s: np.ndarray  # float64, when it was sent, which may be later than the trace has it
    queue_s: np.ndarray  # float64, from then to first admission
    ttft_s: np.ndarray  # float64, from then to the first output token
    tpot_s: np.ndarray  # float64, mean time between output tokens; NaN where there is one token
    finish_s: np.ndarray  # float64
    prompt_tokens: np.ndarray  # int64
    output_tokens: np.ndarray  # int64, tokens produced
    hit_tokens: np.ndarray  # int64, prompt tokens that need no prefill, at first admission
    hit_blocks: np.ndarray  # int32
    preemptions: np.ndarray  # int32
    rejected: np.ndarray  # int8, 0 or state.TOO_LONG_FOR_POOL, TOO_LONG_FOR_MODEL
    replica: np.ndarray  # int64, the server that it ran on

    @property
    def e2e_s(self) -> np.ndarray:
        """From sending to the last token, float64 [n]."""
        return self.finish_s - self.arrival_s


@dataclass(frozen=True, slots=True, eq=False)
class StepLog:
    """Runs of `steps` consecutive steps [m]; one step each until there are more than 65,536, means over them after."""

    start_s: np.ndarray  # float64, from the first arrival
    steps: np.ndarray  # int64, steps of the entry
    duration_us: np.ndarray  # float64, all from here on are means over the entry's steps
    rows: np.ndarray  # float64, running requests
    decode_rows: np.ndarray  # float64, requests past prefill, of one output token each but where drafts are checked
    prefill_tokens: np.ndarray  # float64
    waiting: np.ndarray  # float64, requests that have arrived and do not run
    pages: np.ndarray  # float64, KV pages in use
    attention_us: np.ndarray  # float64, decode attention
    rest_us: np.ndarray  # float64, the rest of the layers, had the step been without prefill
    prefill_us: np.ndarray  # float64, what prefill added
    best_attention_us: np.ndarray  # float64, decode attention on the cheapest route of each step
    route_steps: np.ndarray  # [m, len(ROUTES)] float64, steps of the entry on each route


@dataclass(frozen=True, slots=True, eq=False)
class StepSample:
    """Up to 64 decode steps [k], evenly spread over the run's."""

    lens: np.ndarray  # [k, max_batch] int64, tokens in cache of the first `rows`, longest first
    rows: np.ndarray  # [k] int64
    route: np.ndarray  # [k] int64, of the full-attention layers, index into ROUTES
    splits: np.ndarray  # [k] int64, splits of every row, 0 where the route's own rule chose

    def steps(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """(lens [rows] int32, route, splits) of each step."""
        for lens, rows, route, splits in zip(self.lens, self.rows, self.route, self.splits):
            yield lens[:rows].astype(np.int32), int(route), int(splits)


def request_log(work: Requests, states: Sequence[SchedulerState], owner: np.ndarray) -> RequestLog:
    """Of all servers. owner [n] int64: the server of each request."""
    def column(name: str) -> np.ndarray:
        return np.stack([getattr(state, name) for state in states])[owner, np.arange(len(owner))]

    # As the client sees it: sent before the server's queue has it, answered after a step has ended.
    output, queued_us, late_us = column("generated"), states[0].clients.sent_us, work.output_us
    sent_us, first_us, finish_us = (
        queued_us - work.queue_us, column("first_token_us") + late_us, column("finish_us") + late_us,
    )  # fmt: skip
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot_s = (finish_us - first_us) / (output - 1) / 1e6
    arrival_s = sent_us / 1e6
    return RequestLog(
        arrival_s=arrival_s,
        queue_s=(column("start_us") - sent_us) / 1e6,
        ttft_s=first_us / 1e6 - arrival_s,  # as e2e_s, which rounding must not make less
        tpot_s=np.where(output > 1, tpot_s, np.nan),
        finish_s=finish_us / 1e6,
        prompt_tokens=work.prompt,
        output_tokens=output,
        hit_tokens=column("hit_tokens"),
        hit_blocks=column("hit_blocks"),
        preemptions=column("preemptions"),
        rejected=work.rejected,
        replica=owner,
    )


def step_log(log: RunLog) -> StepLog:
    """Of one server."""
    used = int(log.counts[LOG_USED])
    steps = np.full(used, log.counts[LOG_STRIDE], np.int64)
    if used:
        steps[-1] = log.counts[LOG_FILL]
    means = log.log[:used] / steps[:, None]
    return StepLog(
        start_s=log.log[:used, START] / 1e6,
        steps=steps,
        duration_us=means[:, DURATION],
        rows=means[:, ROW_COUNT],
        decode_rows=means[:, DECODE_ROWS],
        prefill_tokens=means[:, PREFILL_TOKENS],
        waiting=means[:, WAITING_COUNT],
        pages=means[:, PAGES],
        attention_us=means[:, ATTENTION],
        rest_us=means[:, REST],
        prefill_us=means[:, PREFILL],
        best_attention_us=means[:, BEST],
        route_steps=log.log_routes[:used].copy(),
    )


def in_order(parts: Sequence[StepLog]) -> StepLog:
    """The steps of all servers by their starts."""
    if len(parts) == 1:
        return parts[0]
    columns = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(StepLog)}
    order = np.argsort(columns["start_s"], kind="stable")
    return StepLog(**{name: column[order] for name, column in columns.items()})


def step_sample(logs: Sequence[RunLog]) -> StepSample:
    """Of several servers' steps a share each."""
    parts = []
    for log in logs:
        used = int(log.counts[SAMPLES_USED])
        kept = np.linspace(0, used - 1, min(used, max(1, SAMPLES // len(logs)))).astype(int) if used else slice(0, 0)
        parts.append((log.sample_lens[kept], log.sample_choice[kept]))
    lens, choice = (np.concatenate(arrays) for arrays in zip(*parts))
    return StepSample(lens, *choice.T)
