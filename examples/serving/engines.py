"""The engines that serving_trace compares, each planning and running the same step on the same pages."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run, StepPlanner
from gpu.kernels.variant import TILE_TOKENS
from gpu.routes import flashinfer_decode as fi
from gpu.routes.route_engines import BACKENDS, RouteUnavailable, available_routes, build
from pkvsim import DecodeShape, make_schedule
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import OWN_ROUTES
from pkvsim.pricing.counters import StepCounters, schedule_counters, useful_kv_bytes

if TYPE_CHECKING:
    import torch

    from gpu.routes.router import Router
    from pkvsim.policy.by_name import Decision

PAPER_DEFAULT = "flashinfer_tensor_core"  # what the paper compares with, whatever the shape
ADAPTIVE = "adaptive"


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """One decode step, as a serving engine has it at hand: what is made here is in nobody's time.

    Lengths arrive on the host; tables are on the GPU in both forms, ours and FlashInfer's, as an engine that updates
    them page by page would keep them. Taking the lengths to the GPU, if it is needed, is part of planning.
    """

    seq_lens: np.ndarray  # [batch_size] int32
    pinned: torch.Tensor  # the same, in pinned host memory
    on_gpu: torch.Tensor  # [batch_size] int32, written by plan()
    table: torch.Tensor  # [batch_size, max_pages of the trace] int32, on the GPU
    table_host: np.ndarray  # [batch_size, pages of the longest row] int32
    packed: fi.PackedTable  # of table_host: XQA takes its width for the longest row
    q: torch.Tensor  # [batch_size, num_q_heads, head_dim]
    splits: dict[str, np.ndarray | None]  # by route, for those that are pinned to some


def make_step(
    shape: DecodeShape,
    seq_lens: np.ndarray,
    table: np.ndarray,
    splits: dict[str, np.ndarray | None],
    *,
    dtype: torch.dtype,
) -> StepInputs:
    """table: [batch_size, max_pages of the trace] int32, entries past a row's end anything."""
    import torch

    narrow = np.maximum(
        table[:, : max(1, int(-(-seq_lens.max() // shape.page_size)))], 0
    )  # XQA may prefetch past a row
    pinned = torch.from_numpy(seq_lens.astype(np.int32)).pin_memory()
    q = torch.randn(len(seq_lens), shape.num_q_heads, shape.head_dim, device="cuda").to(dtype)
    return StepInputs(
        seq_lens=seq_lens,
        pinned=pinned,
        on_gpu=torch.empty(len(seq_lens), dtype=torch.int32, device="cuda"),
        table=torch.from_numpy(table).cuda(),
        table_host=narrow,
        q=q,
        splits=splits,
        packed=fi.pack_table(seq_lens, narrow, page_size=shape.page_size),
    )


class Contender(Protocol):
    """plan() once a step, then run() for every layer into `out`."""

    name: str

    def plan(self, step: StepInputs) -> None: ...

    def run(self, step: StepInputs, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None: ...


class FixedRoute:
    """One route for every step."""

    __slots__ = ("name", "route", "engine", "_lse")

    def __init__(self, route: str, shape: DecodeShape, dtype: str) -> None:
        self.name = self.route = route
        self.engine: StepPlanner = build(route, shape, dtype)
        self._lse: torch.Tensor | None = None

    def plan(self, step: StepInputs) -> None:
        if self.route == "balanced":
            step.on_gpu.copy_(step.pinned, non_blocking=True)
            self.engine.plan(StepTables(step.on_gpu, step.table))
        else:
            tables = StepTables(step.seq_lens, step.table)
            self.engine.plan(tables, splits=step.splits.get(self.route), packed=step.packed)

    def run(self, step: StepInputs, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
        if self.route in OWN_ROUTES and (self._lse is None or len(self._lse) != len(out)):
            self._lse = _empty_lse(out)
        self.engine.run(Run(step.q, k_pages, v_pages, out, self._lse))


class RoutedSteps:
    """The router: what schedule="auto" does for lengths that the host knows."""

    __slots__ = ("name", "router", "_lse")

    def __init__(self, router: Router) -> None:
        self.name, self.router = ADAPTIVE, router
        self._lse: torch.Tensor | None = None

    def plan(self, step: StepInputs) -> None:
        step.on_gpu.copy_(step.pinned, non_blocking=True)
        self.router.plan(step.on_gpu, step.table, host_seq_lens=step.seq_lens, packed=step.packed)

    def run(self, step: StepInputs, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
        lse = None
        if self.router.decision.route in OWN_ROUTES:
            if self._lse is None or len(self._lse) != len(out):
                self._lse = _empty_lse(out)
            lse = self._lse
        self.router.run(Run(step.q, k_pages, v_pages, out, lse))


def _empty_lse(out: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)


@dataclass(frozen=True, slots=True, eq=False)
class EngineSet:
    """All engines of one head shape, and why others are missing."""

    shape: DecodeShape
    engines: dict[str, Contender]
    left_out: dict[str, str]

    @property
    def routes(self) -> tuple[str, ...]:
        """The fixed routes among them."""
        return tuple(name for name in self.engines if name != ADAPTIVE)

    @property
    def baseline(self) -> str:
        """The engine whose results the others are compared with."""
        return next(name for name in (PAPER_DEFAULT, *BACKENDS, *OWN_ROUTES) if name in self.engines)


def build_engines(
    shape: DecodeShape, dtype: str, wanted: tuple[str, ...], *, device: DeviceSpec, layers: int
) -> EngineSet:
    """Builds the wanted engines that this machine can run."""
    from gpu.measure.timing import shared_stream
    from gpu.routes.router import Router

    engines: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name in wanted:
        if name == ADAPTIVE:
            continue
        if name not in available_routes(shape):
            left_out[name] = "not installed, or not for this shape"
            continue
        try:
            with shared_stream():
                engines[name] = FixedRoute(name, shape, dtype)
        except RouteUnavailable as error:
            left_out[name] = str(error).removeprefix(f"{name}: ")
    if ADAPTIVE in wanted:
        router = Router(shape, dtype, device=device, layers=layers, needs_lse=False)
        router.available = tuple(route for route in router.available if route not in left_out)
        engines[ADAPTIVE] = RoutedSteps(router)
    return EngineSet(shape=shape, engines=engines, left_out=left_out)


def own_counters(
    engines: EngineSet, route: str, seq_lens: np.ndarray, splits: np.ndarray | None, *, device: DeviceSpec
) -> StepCounters:
    """Counters of the schedule that this engine of ours makes of a step, by pkvsim's planner."""
    engine, shape = engines.engines[route].engine, engines.shape
    # Where a group is split, its parts are planned as KV heads; the KV is still useful once.
    heads = replace(shape, num_kv_heads=shape.num_kv_heads * engine.config.head_split)
    if route == "balanced":
        schedule = make_schedule(
            route,
            heads,
            seq_lens,
            tile_tokens=TILE_TOKENS,
            num_ctas=engine.num_ctas,
            costs=engine.costs,
        )
    else:
        schedule = make_schedule(route, heads, seq_lens, splits=splits, tile_tokens=engine.tile_tokens)
    counters = schedule_counters(schedule, heads, seq_lens, device)
    return replace(counters, useful_kv_bytes=useful_kv_bytes(shape, seq_lens))


def decide(router: Router, seq_lens: np.ndarray) -> Decision:
    """What the policy says of a step, without the router's memory of other steps."""
    return router.policy.decide(router.shape, seq_lens, router.device, layers=router.layers, available=router.available)
