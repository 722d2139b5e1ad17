"""The scheduler as a real serving loop drives it: what runs, step by step, never what it costs.

    scheduler = Scheduler(requests, limits)
    while (at_us := scheduler.next_work_us(now_us)) < math.inf:
        if at_us > now_us:
            ...                                  # nothing to do until at_us
        step = scheduler.next_step(now_us)
        ...                                      # run step.decode and the chunks of step.prefill
        scheduler.end_step(now_us)               # tokens are out, at the time that it is by then

The compiled loop (pkvsim.serving.loop) calls the same functions of pkvsim.serving.scheduling.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkvsim.serving.scheduling import end_step, next_work_us, plan_step
from pkvsim.serving.state import (
    FINISHED,
    FIRST_ADMITTED,
    JUST_PREEMPTED,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_RUNNING,
    Limits,
    Requests,
    SchedulerState,
    new_scheduler_state,
)


@dataclass(frozen=True, slots=True, eq=False)
class StepWork:
    """What runs in a step, requests by their place in the trace; a request is in `decode` or in `prefill`, not both.

    decode [rows] int64: requests that decode a token, longest first, and decode_lens [rows] int64 the tokens that each
    attends to, the one decoded from included. prefill [chunks] int64: requests of whose prompts (after a preemption:
    prompt and tokens generated so far) prefill_tokens [chunks] are computed from prefill_begins [chunks] on; the first
    prefill_begins tokens are cached. A chunk that ends a prompt gives the request's next token.
    admitted: those of `prefill` that begin to run with this step; preempted: requests that stopped before it, whose
    pages are gone, in that order.
    """

    decode: np.ndarray
    decode_lens: np.ndarray
    prefill: np.ndarray
    prefill_begins: np.ndarray
    prefill_tokens: np.ndarray
    admitted: np.ndarray
    preempted: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens computed by the step."""
        return len(self.decode) + int(self.prefill_tokens.sum())


class Scheduler:
    """Continuous batching with chunked prefill over a pool of pages, as vLLM's scheduler does it.

    `state` (pkvsim.serving.state.SchedulerState) has every request's phase, cached and generated tokens, pages and
    times; to be read, not written.
    """

    __slots__ = ("requests", "limits", "state", "_planned")

    def __init__(self, requests: Requests, limits: Limits) -> None:
        # Whoever stops a request early changes how many tokens it gives.
        self.requests, self.limits = requests._replace(output=requests.output.copy()), limits
        self.state: SchedulerState = new_scheduler_state(self.requests, limits)
        self._planned = False

    def next_work_us(self, now_us: float) -> float:
        """now_us where a request runs or waits, else when the next one arrives, infinity after the last."""
        return next_work_us(self.state, float(now_us))

    def next_step(self, now_us: float) -> StepWork:
        """Plans a step of what there is at now_us; nothing runs where next_work_us is later. RuntimeError where the
        step before has not ended."""
        if self._planned:
            raise RuntimeError("next_step: call end_step() first")
        self.next_work_us(now_us)
        plan_step(self.requests, self.limits, self.state, float(now_us))
        self._planned = True
        state, counts = self.state, self.state.counts.tolist()
        decode = state.decoding[: counts[NUM_DECODING]].copy()
        chunks = slice(counts[NUM_CHUNKS])
        prefill = state.chunk_request[chunks].copy()
        preempted = state.preempted[: counts[JUST_PREEMPTED]].copy()
        return StepWork(
            decode=decode,
            decode_lens=state.cached[decode] + 1,
            prefill=prefill,
            prefill_begins=state.chunk_begin[chunks].copy(),
            prefill_tokens=state.chunk_tokens[chunks].copy(),
            admitted=prefill[counts[FIRST_ADMITTED] :],
            preempted=preempted,
        )

    def end_step(self, now_us: float, *, stopped: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """Ends the planned step at now_us; returns the requests that finished with it, int64 [k].

        stopped: requests whose token of this step is their last, whatever the trace says (an end-of-sequence token).
        RuntimeError where no step is planned.
        """
        if not self._planned:
            raise RuntimeError("end_step: call next_step() first")
        for request in stopped:
            self.requests.output[request] = self.state.generated[request] + 1
        self.next_work_us(now_us)  # what is sent during the step finds no slot that its end sets free
        before = self.state.running[: self.state.counts[NUM_RUNNING]].copy()
        end_step(self.requests, self.limits, self.state, float(now_us))
        self._planned = False
        return before[self.state.phase[before] == FINISHED]
