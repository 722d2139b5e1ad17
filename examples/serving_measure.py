"""Times one step on one engine: the GPU's time by CUDA events and the whole step by the wall clock, from cold L2."""
from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu.timing import StreamLimit

if TYPE_CHECKING:
    import torch

    from serving_engines import Engine, StepInputs

CYCLES_PER_US = 2000  # of the fastest GPU clocks: a wait is never shorter than asked for
LEAD_US = 40.0  # how much longer the GPU is kept waiting than the host needs to issue a step


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over the repeats of one step, us.

    event_us: from the first layer's start to the last one's end on the GPU, which never waits for the host.
    wall_us: planning, all layers and the final synchronise. plan_us: the host's part of planning in it.
    """

    event_us: float
    wall_us: float
    plan_us: float


Caches = tuple[tuple["torch.Tensor", "torch.Tensor"], ...]  # (k_pages, v_pages) of distinct layers


class StepTimer:
    """layers: runs of every plan, over the caches in turn. Use inside gpu.timing.shared_stream()."""

    __slots__ = ("limit", "layers", "repeats")

    def __init__(self, limit: StreamLimit, *, layers: int, repeats: int) -> None:
        self.limit, self.layers, self.repeats = limit, layers, repeats

    def run_layers(self, engine: Engine, step: StepInputs, caches: Caches, out: torch.Tensor) -> None:
        for layer in range(self.layers):
            engine.run(step, *caches[layer % len(caches)], out)

    def event_us(self, engine: Engine, step: StepInputs, caches: Caches, out: torch.Tensor) -> float:
        import torch

        engine.plan(step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.run_layers(engine, step, caches, out)
        lead_us = (time.perf_counter() - start) * 1e6 + LEAD_US
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)
        ]
        for begin, end in marks:
            self.limit.flush()
            torch.cuda._sleep(int(lead_us * CYCLES_PER_US))
            begin.record()
            self.run_layers(engine, step, caches, out)
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in marks)

    def wall_us(self, engine: Engine, step: StepInputs, caches: Caches, out: torch.Tensor) -> tuple[float, float]:
        """(wall_us, plan_us)."""
        import torch

        walls, plans = [], []
        for _ in range(self.repeats):
            self.limit.flush()
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine.plan(step)
            planned = time.perf_counter()
            self.run_layers(engine, step, caches, out)
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) * 1e6)
            plans.append((planned - start) * 1e6)
        return statistics.median(walls), statistics.median(plans)

    def measure(
        self, engines: list[Engine], step: StepInputs, caches: Caches, out: torch.Tensor
    ) -> dict[str, StepTimes]:
        """Every engine on the step, by name."""
        events = {engine.name: self.event_us(engine, step, caches, out) for engine in engines}
        walls = {engine.name: self.wall_us(engine, step, caches, out) for engine in engines}
        return {name: StepTimes(events[name], *walls[name]) for name in events}
