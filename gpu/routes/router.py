"""Routes every step to the engine that the policy prices cheapest, FlashInfer's backends included where installed."""
from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run, StepPlanner
from gpu.kernels.this_gpu import this_gpu
from gpu.routes import flashinfer_decode as fi
from gpu.routes import route_engines as routes
from pkvsim import DecodeShape
from pkvsim.devices.device import DEVICES, DeviceSpec, get_device
from pkvsim.devices.route_model import OWN_ROUTES
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.by_name import CalibratedPolicy, Decision, Policy
from pkvsim.shapes import check_int, check_seq_lens

LOG = logging.getLogger(__name__)
KEPT_DECISIONS = 1024
PAPER_FLASHINFER = "flashinfer"  # of the paper's policy, which ran it on tensor cores
KEY_SHIFT = 23 - 5  # a kept decision stands for lengths alike in the first 6 bits, within 3.1 %: prices vary as little
ON_DEVICE = Decision("balanced", None, {}, "lengths are on the GPU, where balanced plans without asking the host")


class Router:
    """DecodeEngine's plan() and run() over every route.

    A route is chosen where the lengths are known on the host: seq_lens on the host (NumPy, a list, a CPU tensor), or
    on the GPU with `host_seq_lens` beside them, as serving engines keep both. Lengths on the GPU alone, as in a
    captured CUDA graph whose lengths change under it, take `balanced`: asking for them would stop the host until the
    GPU is idle, which costs more than any route gains, and a captured choice could not follow them.

    A step with an empty row, or one of fewer tokens than it has query tokens, stays on our own routes, which define its
    result (zeros and -inf). FlashInfer's routes are built, and their kernels with them, when a step first chooses them;
    one that cannot be built is named in a warning, once a process, and left out from then on. Every first choice for a
    batch size is logged with its reason (INFO).

    plan() and run() belong on one stream, as DecodeEngine's do. `decision` and `counts` say what was chosen.
    """

    __slots__ = (
        "shape",
        "dtype",
        "options",
        "device",
        "policy",
        "layers",
        "available",
        "decision",
        "counts",
        "_needs_lse",
        "_build",
        "_engines",
        "_active",
        "_decisions",
        "_logged",
    )

    def __init__(
        self,
        shape: DecodeShape,
        dtype: str = "float16",
        *,
        policy: Policy | None = None,
        device: DeviceSpec | str | os.PathLike | None = None,
        layers: int = 1,
        needs_lse: bool = True,
        scale: float | None = None,
        options: AttentionOptions = PLAIN,
        layout: str = "HND",
        build: Callable[..., StepPlanner] = routes.build,
    ) -> None:
        """
        policy: CalibratedPolicy() by default. device: the calibrated GPU to price for, by name or path; by default the
        one of the catalogue that this GPU is. layers: runs of every plan. needs_lse: whether run() must return an LSE
        whatever the route; without it XQA takes part and FlashInfer's routes return None for it. scale: of the logits;
        FlashInfer's routes serve the default only. options, layout: as DecodeEngine's; FlashInfer's routes take part
        where they serve them.

        Raises ValueError naming the argument.
        """
        self.shape, self.dtype, self.options = shape, dtype, options
        self.layers = check_int("layers", layers, 1)
        scale = None if scale is None else checks.check_scale(scale)
        self.policy = CalibratedPolicy() if policy is None else policy
        if isinstance(device, (str, os.PathLike)):
            device = get_device(os.fspath(device))
        checks.expect("device", "a DeviceSpec, a name or a path", repr(device),
                      device is None or isinstance(device, DeviceSpec))
        self.device = this_device() if device is None else device
        self._needs_lse = needs_lse
        self._build = functools.partial(build, scale=scale, options=options, layout=layout)
        self.available: tuple[str, ...] = OWN_ROUTES
        if scale is None:
            self.available = routes.available_routes(shape, needs_lse=needs_lse, options=options, layout=layout)
        self.decision: Decision | None = None
        self.counts: dict[str, int] = {}  # steps planned, by route
        self._engines: dict[str, StepPlanner] = {}
        self._active: StepPlanner | None = None
        self._decisions: OrderedDict[bytes, Decision] = OrderedDict()
        self._logged: set[tuple[int, str]] = set()
        if not fi.installed():
            _warn_once(
                f"FlashInfer is not installed: the routes {', '.join(routes.BACKENDS)} are missing, steps are routed "
                f"among {', '.join(self.available)}"
            )
        if self.device is None or not self.device.routes:
            _warn_once(
                "this GPU is not calibrated: every step takes balanced. `python -m gpu.calibrate -o mygpu.json` "
                "calibrates it; pass device='mygpu.json'"
            )

    def plan(
        self,
        seq_lens: object,
        block_table: object,
        *,
        host_seq_lens: object = None,
        packed: fi.PackedTable | None = None,
        validate: bool = False,
    ) -> None:
        """Chooses the step's route and plans it there; arguments as DecodeEngine.plan.

        host_seq_lens: the same lengths on the host, where seq_lens are on the GPU; an int32 array is taken as it is,
        since checking it would cost as much as choosing by it. packed: the block table in FlashInfer's form, where the
        caller keeps one; without it FlashInfer's routes make it, which copies a block table that is on the GPU to the
        host.
        """
        if host_seq_lens is None:
            lens = _on_host(seq_lens)
            seq_lens = seq_lens if lens is None else lens
        else:
            lens = _taken_or_checked(host_seq_lens)
        engine = None
        while engine is None:
            decision = self._decide(lens)
            engine = self._engines.get(decision.route) or self._engine(decision.route)
        tables = StepTables(seq_lens if decision.route == "balanced" else lens, block_table)
        engine.plan(tables, splits=decision.splits, packed=packed, validate=validate)
        self._active = engine
        self.counts[decision.route] = self.counts.get(decision.route, 0) + 1
        if decision is not self.decision:
            self.decision = decision
            self._log(len(seq_lens), decision)

    def _log(self, batch_size: int, decision: Decision) -> None:
        if (batch_size, decision.route) not in self._logged:
            self._logged.add((batch_size, decision.route))
            LOG.info("%s, %d rows: %s (%s)", self.shape, batch_size, decision.route, decision.reason)

    def run(self, run: Run) -> tuple[object, object | None]:
        """Attention of the planned step, as DecodeEngine.run.

        Raises ValueError naming what routes need not serve, RuntimeError when nothing was planned.
        """
        checks.check_routed(scale=run.scale, query_lens=run.query_lens, k_scale=run.k_scale, v_scale=run.v_scale,
                            selected=run.selected, page_lse=run.page_lse)
        if self._active is None:
            raise RuntimeError("run: call plan() first")
        if run.lse is None and self._needs_lse and self.decision.route not in OWN_ROUTES:
            run = run._replace(lse=arrays.empty_like(run.q, arrays.shape_of("q", run.q)[:-1], "float32"))
        return self._active.run(run)

    def _decide(self, lens: np.ndarray | None) -> Decision:
        if lens is None or self.device is None or not self.device.routes:
            return ON_DEVICE if lens is None else Decision("balanced", None, {}, "this GPU is not calibrated")
        # The sign, the exponent and the first bits of a float32: edges at powers of two, where policies have theirs.
        key = (lens.astype(np.float32).view(np.int32) >> KEY_SHIFT).tobytes()
        decision = self._decisions.get(key)
        if decision is not None:
            self._decisions.move_to_end(key)
            return decision
        available = self.available if (lens >= self.options.query_tokens).all() else OWN_ROUTES
        decision = self.policy.decide(
            self.shape, lens, self.device, layers=self.layers, available=available, options=self.options
        )
        if decision.route == PAPER_FLASHINFER:
            decision = dataclasses.replace(decision, route="flashinfer_tensor_core")
        if decision.route not in available:
            raise ValueError(f"policy: expected a route among {', '.join(available)}, got {decision.route}")
        self._decisions[key] = decision
        if len(self._decisions) > KEPT_DECISIONS:
            self._decisions.popitem(last=False)
        return decision

    def _engine(self, route: str) -> StepPlanner | None:
        """The route's engine; None, once, where FlashInfer's cannot be built."""
        if route not in self._engines:
            try:
                self._engines[route] = self._build(route, self.shape, self.dtype)
            except routes.RouteUnavailable as error:
                _warn_once(f"left out from now on: {error}")
                self.available = tuple(name for name in self.available if name != route)
                self._decisions.clear()
                return None
        return self._engines[route]


def this_device() -> DeviceSpec | None:
    """The catalogue's calibrated GPU that the current one is by name, SMs and compute capability, or None."""
    from gpu.measure.environment import gpu_slug

    gpu = this_gpu()
    slug, capability = gpu_slug(gpu.name), divmod(gpu.compute_capability, 10)
    for name, spec in DEVICES.items():
        same = spec.num_sms == gpu.num_sms and spec.compute_capability == capability
        if spec.routes and same and slug.startswith(name):
            return spec
    return None


def _taken_or_checked(host_seq_lens: object) -> np.ndarray:
    """Lengths on the host as int32 [batch_size]. Raises ValueError naming host_seq_lens."""
    if type(host_seq_lens) is np.ndarray and host_seq_lens.dtype == np.int32 and host_seq_lens.ndim == 1:
        return host_seq_lens
    lens = _on_host(host_seq_lens, "host_seq_lens")
    checks.expect("host_seq_lens", "lengths on the host", "an array on a GPU", lens is not None)
    assert lens is not None
    return lens


def _on_host(seq_lens: object, name: str = "seq_lens") -> np.ndarray | None:
    """Lengths that are on the host, as int32; None where they are on a GPU."""
    if isinstance(seq_lens, (list, tuple, np.ndarray)):
        return check_seq_lens(seq_lens, name)
    if arrays.view(name, seq_lens).device >= 0:
        return None
    return check_seq_lens(arrays.to_host(name, seq_lens), name)


@functools.cache
def _warn_once(message: str) -> None:
    LOG.warning(message)
