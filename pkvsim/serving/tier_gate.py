"""What the compiled loop knows of loads: who asks the pool, and when what it loads is there. Compiled.

The loop returns to Python as soon as a request asks. Its `cached` and `ready_us` are set there, and the step is planned
again as of the same time, of which nothing has been run by then.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pkvsim.compiled import inner


class TierGate(NamedTuple):
    """t is the number of requests, or 0 where no tiers stand behind the GPU."""

    asking: np.ndarray  # [1] int64, the admitted request that the pool is asked about, -1 none
    asked_us: np.ndarray  # [1] float64, when it began to ask
    ready_us: np.ndarray  # [t] float64, when a request's loaded blocks are there, infinity until the pool has answered


def new_gate(num_requests: int, tiers: bool) -> TierGate:
    """Nobody asks."""
    return TierGate(np.full(1, -1, np.int64), np.zeros(1), np.zeros(num_requests if tiers else 0))


@inner
def ask(gate, request, now_us):
    """Lets an admitted request ask the pool; False where there is none."""
    if len(gate.ready_us) == 0:
        return False
    gate.asking[0] = request
    gate.asked_us[0] = now_us
    gate.ready_us[request] = math.inf
    return True


@inner
def asks(gate):
    """Whether the pool must answer before the step may be planned on."""
    return gate.asking[0] >= 0


@inner
def is_ready(gate, request, now_us):
    """Whether what the request loads is there, if it loads anything."""
    return len(gate.ready_us) == 0 or gate.ready_us[request] <= now_us


@inner
def next_ready_us(gate, running, count, now_us):
    """When the first of the running requests that wait for their blocks has them, infinity where none waits."""
    first_us = math.inf
    if len(gate.ready_us):
        for at in range(count):
            ready_us = gate.ready_us[running[at]]
            if now_us < ready_us < first_us:
                first_us = ready_us
    return first_us
