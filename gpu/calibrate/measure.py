"""Times every route on a calibration cell: the kernel cold in a CUDA graph, and the step alone with its planning."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu.calibrate.cells import SEED, CalibrationCell
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run, StepPlanner
from gpu.measure.pools import BenchPool
from gpu.measure.step_timing import HostTimes, step_event_us, step_host_times
from gpu.measure.timing import StreamLimit, graph_time_us, l2_bytes
from gpu.routes import flashinfer_decode as fi
from gpu.routes.route_engines import BACKENDS, RouteUnavailable, available_routes, build
from pkvsim import DecodeShape
from pkvsim.devices.route_model import OWN_ROUTES
from pkvsim.fitting.measurements import Measurement

TOLERANCE = 2e-3  # FP16 outputs of different engines on the same values
STEP_REPEATS = 5

Timed = tuple[str, "int | None"]  # route and pinned splits


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step alone on the GPU, us."""

    event_us: float
    host: HostTimes


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One route on a cell; run(layer) reads that layer's cache, of num_layers."""

    route: str
    splits: int | None
    plan: Callable[[], None]
    run: Callable[[int], None]
    num_layers: int


class Calibrator:
    """The pool, and the engines of the shape being measured. Use inside gpu.measure.timing.shared_stream()."""

    __slots__ = ("pool", "limit", "repeats", "unavailable", "_say", "_shape", "_engines")

    def __init__(self, pool: BenchPool, limit: StreamLimit, *, repeats: int, say: Callable[[str], None]) -> None:
        """repeats: graph replays per timing. say: told, once each, of the routes that cannot run here and why."""
        self.pool, self.limit, self.repeats = pool, limit, repeats
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
            event_us = step_event_us(lambda: case.run(0), flush=self.limit.flush, repeats=STEP_REPEATS)
            host = step_host_times(case.plan, lambda: case.run(0), flush=self.limit.flush, repeats=STEP_REPEATS)
            found[case.route, case.splits] = StepTimes(event_us, host)
        return found

    def measure(self, cell: CalibrationCell, steps: dict[Timed, StepTimes] | None = None) -> Iterator[Measurement]:
        """Every timing of the cell, each checked against the first route's result beforehand. steps: what steps() gave
        for it, put beside.

        Raises ValueError starting with "pool-gib" when the pool is too small, RuntimeError when one of our own routes
        gives another result.
        """
        for case in self._cases(cell):
            kernel = graph_time_us(case.run, variants=case.num_layers, repeats=self.repeats)
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

    def _cases(self, cell: CalibrationCell) -> Iterator[_Case]:
        """Everything that the cell times, once its result is found right."""
        import torch

        shape, lens = cell.shape, cell.lengths()
        pages = self.pool.lay_out(shape, lens, kv_bytes=cell.kv_bytes, l2_size=l2_bytes(), seed=SEED)
        q = torch.randn(len(lens), shape.num_q_heads, shape.head_dim, device="cuda").to(self.pool.flat.dtype)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
        table = torch.from_numpy(pages.block_table).cuda()
        pinned = torch.from_numpy(lens).pin_memory()
        lens_on_gpu = pinned.cuda()
        packed = fi.pack_table(lens, pages.block_table, page_size=shape.page_size)
        expected = None
        for route, splits in cell.timings(available_routes(shape)):
            engine = self._engine(route, shape)
            if engine is None:
                continue

            def plan() -> None:
                if route == "balanced":
                    lens_on_gpu.copy_(pinned, non_blocking=True)
                    engine.plan(StepTables(lens_on_gpu, table))
                else:
                    engine.plan(StepTables(lens, table), splits=splits, packed=packed)

            def run(layer: int) -> None:
                engine.run(Run(q, *pages.layers[layer], out, lse if route in OWN_ROUTES else None))

            out.fill_(float("nan"))
            plan()
            run(0)
            torch.cuda.synchronize()
            if expected is None:
                expected = out.clone()
            difference = float((out.float() - expected.float()).abs().max())
            if not difference < TOLERANCE:
                self._differs(route, cell, difference)
                continue
            yield _Case(route, splits, plan, run, len(pages.layers))

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

    def _differs(self, route: str, cell: CalibrationCell, difference: float) -> None:
        said = f"{route}: differs by {difference:.2g} from the first route at {cell.group}, batch {len(cell.seq_lens)}"
        if route not in BACKENDS:
            raise RuntimeError(said)
        self._drop(route, cell.shape, said)

    def _drop(self, route: str, shape: DecodeShape, reason: str) -> None:
        self.unavailable[route, shape] = reason
        self._engines.pop(route, None)
        self._say(f"left out at {shape.num_q_heads}/{shape.num_kv_heads} heads: {reason}")

