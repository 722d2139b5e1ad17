"""Several equal servers behind a router: who gets which request, and the servers' steps in the order of their ends.

round-robin   the k-th request that is sent goes to server k modulo their number.
least-tokens  to the server with the fewest tokens left to serve: prompt and output of what it was sent and has not
              finished, less the output that it gave. Output lengths are known to the simulator alone.
prefix        to the server that was sent the longest beginning of the prompt before, or the conversation's turn before,
              where that is half of the prompt or more; else as least-tokens (as SGLang's router does, threshold 0.5).
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pkvsim.outside.step_costs import StepCosts
from pkvsim.serving.loop import advance
from pkvsim.serving.queueing.clients import next_send_us, send
from pkvsim.serving.scheduling import forget, take_in
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.state import (
    CLOCK,
    FINISHED,
    FOLLOWING,
    NUM_RUNNING,
    NUM_WAITING,
    PLANNED,
    SERVED,
    Attention,
    Limits,
    Requests,
    RunLog,
    SchedulerState,
)
from pkvsim.traces.requests import RequestTrace

PREFIX_SHARE = 0.5  # of a prompt's blocks, that a server must have been sent before to be preferred
STEPS = 1 << 40  # as many as it takes


class Router:
    """Chooses a server for each request as it is sent."""

    def __init__(self, trace: RequestTrace, requests: Requests, states: list[SchedulerState], router: str) -> None:
        self._requests, self._states, self._router = requests, states, router
        self._unfinished = [np.zeros(0, np.int64) for _ in states]
        self._routed = 0
        self.owner = np.zeros(len(trace), np.int64)  # [n], the server of each request
        self._offsets, self._ids = np.zeros(len(trace) + 1, np.int64), np.zeros(0, np.int64)  # of the prompts' blocks
        if trace.block_hashes is not None and trace.block_offsets is not None:
            self._offsets, self._ids = trace.block_offsets, np.unique(trace.block_hashes, return_inverse=True)[1]
        self._sent = np.zeros((len(states), int(self._ids.max(initial=-1)) + 1), bool)  # blocks that each was sent

    def route(self, request: int) -> int:
        """The request's server."""
        at = self._routed % len(self._states)
        if self._router != "round-robin":
            at = self._by_prefix(request) if self._router == "prefix" else self._least()
        self._routed += 1
        self.owner[request] = at
        self._unfinished[at] = np.append(self._unfinished[at], request)
        if self._router == "prefix":
            self._sent[at, self._blocks(request)] = True
        return at

    def _least(self) -> int:
        left = []
        for at, state in enumerate(self._states):
            ids = self._unfinished[at]
            self._unfinished[at] = ids = ids[state.phase[ids] != FINISHED]
            left.append(int((self._requests.prompt[ids] + self._requests.output[ids] - state.generated[ids]).sum()))
        return int(np.argmin(left))

    def _blocks(self, request: int) -> np.ndarray:
        return self._ids[self._offsets[request] : self._offsets[request + 1]]

    def _by_prefix(self, request: int) -> int:
        if len(self._ids):
            sent = self._sent[:, self._blocks(request)]  # [servers, blocks]
            known = np.where(sent.all(axis=1), sent.shape[1], sent.argmin(axis=1))
            if known.max() >= PREFIX_SHARE * sent.shape[1]:
                return int(known.argmax())
        elif len(self._requests.after):
            before = self._requests.after[request]
            if before >= 0 and self._requests.rejected[before] == SERVED:  # what is refused was sent to no server
                return int(self.owner[before])
        return self._least()


def serve_replicas(
    trace: RequestTrace, requests: Requests, limits: Limits, attention: Attention, costs: StepCosts,
    config: ServingConfig, states: list[SchedulerState], logs: list[RunLog], progress: Callable[[], None],
) -> np.ndarray:  # fmt: skip
    """Serves all requests on servers that share states[0].clients; the server of each request, int64 [n].

    Time goes from one instant to the next at which something is sent or, where an end may cause something to be sent,
    a step ends. At an instant steps end first, then what is due is sent, and then idle servers begin a step.
    """
    clients, router = states[0].clients, Router(trace, requests, states, config.router)
    steps_in_flight = config.profile.steps_in_flight
    coupled = bool(clients.concurrency or len(clients.after))

    def run(until_us: float, plan_until_us: float) -> None:
        for state, log in zip(states, logs):
            planned = log.counts[PLANNED] and log.clock_us[CLOCK] <= until_us
            idle = not log.counts[PLANNED] and state.counts[NUM_RUNNING] + state.counts[NUM_WAITING] == 0
            if planned or not (log.counts[PLANNED] or idle):
                advance(
                    requests, limits, attention, costs, steps_in_flight, state, log, STEPS, until_us, plan_until_us,
                    False,
                )  # fmt: skip

    instants = 0
    while True:
        ends = [log.clock_us[CLOCK] for log in logs if log.counts[PLANNED]] if coupled else []
        now_us = min([next_send_us(clients), *ends])
        if now_us == math.inf:
            run(math.inf, math.inf)
            return router.owner
        run(now_us, math.nextafter(now_us, -math.inf))
        while next_send_us(clients) <= now_us:
            request = int(send(clients))
            if clients.rejected[request] != SERVED:
                continue
            at = router.route(request)
            state, log = states[at], logs[at]
            take_in(state, request)
            if not log.counts[PLANNED]:
                log.clock_us[CLOCK] = now_us
            elif steps_in_flight == 2 and not log.counts[FOLLOWING]:  # it may be planned behind the running step
                advance(
                    requests, limits, attention, costs, steps_in_flight, state, log, 1, -math.inf, now_us, False
                )
            if limits.hold_us > 0:
                for other in states:
                    if other is not state:
                        forget(requests, limits, other, request)
        if coupled:
            run(now_us, now_us)
        instants += 1
        if instants % 1000 == 0:
            progress()
