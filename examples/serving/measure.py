"""Times one step on one engine: the GPU's time by CUDA events and the whole step by the wall clock, from cold L2."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu.measure.step_timing import step_event_us, step_host_times
from gpu.measure.timing import StreamLimit

if TYPE_CHECKING:
    import torch
    from serving.engines import Contender, StepInputs

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
    """layers: runs of every plan, over the caches in turn. Use inside gpu.measure.timing.shared_stream()."""

    __slots__ = ("limit", "layers", "repeats")

    def __init__(self, limit: StreamLimit, *, layers: int, repeats: int) -> None:
        self.limit, self.layers, self.repeats = limit, layers, repeats

    def run_layers(self, engine: Contender, step: StepInputs, caches: Caches, out: torch.Tensor) -> None:
        for layer in range(self.layers):
            engine.run(step, *caches[layer % len(caches)], out)

    def event_us(self, engine: Contender, step: StepInputs, caches: Caches, out: torch.Tensor) -> float:
        engine.plan(step)
        return step_event_us(
            lambda: self.run_layers(engine, step, caches, out), flush=self.limit.flush, repeats=self.repeats
        )

    def wall_us(self, engine: Contender, step: StepInputs, caches: Caches, out: torch.Tensor) -> tuple[float, float]:
        """(wall_us, plan_us)."""
        times = step_host_times(
            lambda: engine.plan(step),
            lambda: self.run_layers(engine, step, caches, out),
            flush=self.limit.flush,
            repeats=self.repeats,
        )
        return times.wall_us, times.plan_us

    def measure(
        self, engines: list[Contender], step: StepInputs, caches: Caches, out: torch.Tensor
    ) -> dict[str, StepTimes]:
        """Every engine on the step, by name."""
        events = {engine.name: self.event_us(engine, step, caches, out) for engine in engines}
        walls = {engine.name: self.wall_us(engine, step, caches, out) for engine in engines}
        return {name: StepTimes(events[name], *walls[name]) for name in events}
