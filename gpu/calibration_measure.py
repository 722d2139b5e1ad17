"""Times every route on a calibration cell: the kernel cold in a CUDA graph, planning on the host, the whole step."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from gpu import flashinfer as fi
from gpu.bench_pool import BenchPool
from gpu.calibration_cells import SEED, CalibrationCell
from gpu.routes import BACKENDS, RouteEngine, RouteUnavailable, available_routes, build
from gpu.timing import StreamLimit, graph_time_us, l2_bytes, shared_stream, wall_time_us
from pkvsim import DecodeShape
from pkvsim.measurements import Measurement
from pkvsim.route_model import OWN_ROUTES

TOLERANCE = 2e-3  # FP16 outputs of different engines on the same values
WALL_REPEATS = 7


class Calibrator:
    """The pool, and the engines of the shape being measured."""

    __slots__ = ("pool", "limit", "repeats", "unavailable", "_say", "_shape", "_engines")

    def __init__(self, pool: BenchPool, limit: StreamLimit, *, repeats: int, say: Callable[[str], None]) -> None:
        """repeats: graph replays per timing. say: told, once each, of the routes that cannot run here and why."""
        self.pool, self.limit, self.repeats = pool, limit, repeats
        self.unavailable: dict[tuple[str, DecodeShape], str] = {}
        self._say = say
        self._shape: DecodeShape | None = None
        self._engines: dict[str, RouteEngine] = {}

    def measure(self, cell: CalibrationCell) -> Iterator[Measurement]:
        """Every timing of the cell, each checked against the first route's result beforehand.

        Raises ValueError starting with "pool-gib" when the pool is too small, RuntimeError when one of our own routes
        gives another result.
        """
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
                    engine.plan(lens_on_gpu, table)
                else:
                    engine.plan(lens, table, splits=splits, packed=packed)

            def run(layer: int) -> None:
                engine.run(q, *pages.layers[layer], out=out, lse=lse if route in OWN_ROUTES else None)

            with shared_stream():
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
            kernel = graph_time_us(run, variants=len(pages.layers), repeats=self.repeats)
            with shared_stream():
                plan_us = _host_time_us(plan)
                wall_us = wall_time_us(lambda: (plan(), run(0)), WALL_REPEATS, before=self.limit.flush)
            yield Measurement(
                route=route,
                shape=shape,
                seq_lens=cell.seq_lens,
                splits=splits,
                plan_us=plan_us,
                kernel_us=kernel.median_us,
                wall_us=wall_us,
            )

    def _engine(self, route: str, shape: DecodeShape) -> RouteEngine | None:
        """The route's engine, or None where it cannot run the shape; engines of other shapes are let go."""
        if shape != self._shape:
            self._engines.clear()
            self._shape = shape
        if route not in self._engines and (route, shape) not in self.unavailable:
            try:
                with shared_stream():
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


def _host_time_us(plan: Callable[[], None]) -> float:
    """Median time for which planning holds the host."""
    import torch

    times = []
    for _ in range(WALL_REPEATS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        plan()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[2:])  # the first calls allocate
