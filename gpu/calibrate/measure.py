"""Times every route on a calibration cell: the kernel cold in a CUDA graph, and the step alone with its planning."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu.calibrate.cells import SEED, CalibrationCell
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run, StepPlanner
from gpu.measure.cases import Attend, StepCase, difference, lay_out
from gpu.measure.pools import BenchPool
from gpu.measure.step_timing import HostTimes, step_event_us, step_host_times
from gpu.measure.timing import StreamLimit
from gpu.routes import flashinfer_decode as fi
from gpu.routes.route_engines import BACKENDS, RouteUnavailable, available_routes, build
from pkvsim import DecodeShape
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.fitting.measurements import Measurement

if TYPE_CHECKING:
    import torch

TOLERANCE = 2e-3  # FP16 outputs of different engines on the same values
STEP_REPEATS = 5

Timed = tuple[str, "int | None"]  # route and pinned splits


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step alone on the GPU, us."""

    event_us: float
    host: HostTimes


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """One route on a cell, its result found right."""

    route: str
    splits: int | None
    plan: Callable[[], None]
    attend: Attend
    step: StepCase
    out: torch.Tensor

    def run(self) -> None:
        """On the first layer."""
        self.attend(*self.step.layers[0], self.out)


class Calibrator:
    """The pool, and the engines of the shape being measured. Use inside gpu.measure.timing.shared_stream()."""

    __slots__ = ("pool", "limit", "repeats", "routes", "unavailable", "_say", "_shape", "_engines")

    def __init__(self, pool: BenchPool, limit: StreamLimit, *, repeats: int, say: Callable[[str], None],
                 routes: tuple[str, ...] = ROUTES) -> None:
        """repeats: graph replays per timing. say: told, once each, of the routes that cannot run here and why. routes:
        no others are timed."""
        self.pool, self.limit, self.repeats, self.routes = pool, limit, repeats, routes
        self.unavailable: dict[tuple[str, DecodeShape], str] = {}
        self._say = say
        self._shape: DecodeShape | None = None
        self._engines: dict[str, StepPlanner] = {}

    def steps(self, cell: CalibrationCell) -> dict[Timed, StepTimes]:
        """Whole steps of everything that the cell times, alone on the GPU, by (route, splits). Raises as measure does.

        To be called of all cells before any is measured: FlashInfer's planning takes 530 us, not 180, in a process
        that captured the graphs of a whole calibration.
        """
        found = {}
        for case in self._cases(cell):
            case.plan()
            event_us = step_event_us(case.run, flush=self.limit.flush, repeats=STEP_REPEATS)
            host = step_host_times(case.plan, case.run, flush=self.limit.flush, repeats=STEP_REPEATS)
            found[case.route, case.splits] = StepTimes(event_us, host)
        return found

    def measure(self, cell: CalibrationCell, steps: dict[Timed, StepTimes] | None = None) -> Iterator[Measurement]:
        """Every timing of the cell, each checked against the first route's result beforehand. steps: what steps() gave
        for it, put beside.

        Raises NoRoom when the pool is too small, RuntimeError when one of our own routes gives another result.
        """
        for case in self._cases(cell):
            kernel = case.step.time(case.attend, repeats=self.repeats)
            step = steps.get((case.route, case.splits)) if steps else None
            yield Measurement(
                route=case.route,
                shape=cell.shape,
                seq_lens=cell.seq_lens,
                splits=case.splits,
                kernel_us=kernel.median_us,
                plan_us=step and step.host.plan_us,
                wall_us=step and step.host.wall_us,
                event_us=step and step.event_us,
                run_us=step and step.host.run_us,
            )

    def _cases(self, cell: CalibrationCell) -> Iterator[_Candidate]:
        """Everything that the cell times, once its result is found right."""
        import torch

        shape, lens = cell.shape, cell.lengths()
        timings = list(cell.timings(tuple(route for route in available_routes(shape) if route in self.routes)))
        if not timings:
            return
        case = lay_out(self.pool, shape, lens, seed=SEED)
        out, lse = torch.empty_like(case.q), torch.empty(case.q.shape[:2], dtype=torch.float32, device="cuda")
        pinned, (lens_on_gpu, table) = torch.from_numpy(lens).pin_memory(), case.on_gpu()
        packed = fi.pack_table(lens, case.block_table, page_size=shape.page_size)
        expected = None
        for route, splits in timings:
            engine = self._engine(route, shape)
            if engine is None:
                continue

            def plan() -> None:
                if route == "balanced":
                    lens_on_gpu.copy_(pinned, non_blocking=True)
                    engine.plan(StepTables(lens_on_gpu, table))
                else:
                    engine.plan(StepTables(lens, table), splits=splits, packed=packed)

            def attend(k_pages: torch.Tensor, v_pages: torch.Tensor, to: torch.Tensor) -> None:
                engine.run(Run(case.q, k_pages, v_pages, to, lse if route in OWN_ROUTES else None))

            plan()
            found = case.result(attend)
            expected = found if expected is None else expected
            off = difference(found, expected)
            if not off < TOLERANCE:
                self._differs(route, cell, off)
                continue
            yield _Candidate(route, splits, plan, attend, case, out)

    def _engine(self, route: str, shape: DecodeShape) -> StepPlanner | None:
        """The route's engine, or None where it cannot run the shape; engines of other shapes are let go."""
        if shape != self._shape:
            self._engines.clear()
            self._shape = shape
        if route not in self._engines and (route, shape) not in self.unavailable:
            try:
                self._engines[route] = build(route, shape)
            except RouteUnavailable as error:
                self._drop(route, shape, str(error))
        return self._engines.get(route)

    def _differs(self, route: str, cell: CalibrationCell, off: float) -> None:
        said = f"{route}: differs by {off:.2g} from the first route at {cell.group}, batch {len(cell.seq_lens)}"
        if route not in BACKENDS:
            raise RuntimeError(said)
        self._drop(route, cell.shape, said)

    def _drop(self, route: str, shape: DecodeShape, reason: str) -> None:
        self.unavailable[route, shape] = reason
        self._engines.pop(route, None)
        self._say(f"left out at {shape.num_q_heads}/{shape.num_kv_heads} heads: {reason}")

