"""Times a whole decode step from cold L2: the GPU's part by CUDA events, and planning and all by the wall clock.

Apart from gpu.measure.timing's graphs, in which layers follow each other: a step alone takes more than one more layer.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

CYCLES_PER_US = 2000  # of the fastest GPU clocks: a wait is never shorter than asked for
LEAD_US = 40.0  # how much longer the GPU is kept waiting than the host needs to issue a step


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Medians over the repeats of one step, us."""

    wall_us: float  # planning, running and the final synchronise
    plan_us: float  # of it, the host's part of planning
    run_us: float  # of it, the host's part of running: issuing every launch


def step_event_us(run: Callable[[], None], *, flush: Callable[[], None], repeats: int) -> float:
    """From the start of what run() launches to its end on the GPU, which never waits for the host.

    run: of a planned step, on torch's current stream. flush: leaves nothing of the step in the L2.
    """
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    lead_us = (time.perf_counter() - start) * 1e6 + LEAD_US
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        flush()
        torch.cuda._sleep(int(lead_us * CYCLES_PER_US))
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in marks)


def step_host_times(
    plan: Callable[[], None], run: Callable[[], None], *, flush: Callable[[], None], repeats: int
) -> HostTimes:
    """plan(), run() and a synchronise, each repeat from an idle GPU and a flushed L2."""
    import torch

    walls, plans, runs = [], [], []
    for _ in range(repeats):
        flush()
        torch.cuda.synchronize()
        start = time.perf_counter()
        plan()
        planned = time.perf_counter()
        run()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - start) * 1e6)
        plans.append((planned - start) * 1e6)
        runs.append((issued - planned) * 1e6)
    return HostTimes(*(statistics.median(times) for times in (walls, plans, runs)))
