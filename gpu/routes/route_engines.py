"""Which routes can run a shape here, and one StepPlanner for each: our schedules, and FlashInfer's backends."""
from __future__ import annotations

from gpu.inputs.run import StepPlanner
from gpu.routes import flashinfer_decode as fi
from gpu.routes.flashinfer_builds import build_failure
from gpu.routes.flashinfer_route import FlashInferRoute
from pkvsim import DecodeShape
from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.devices.route_options import SERVED, asked
from pkvsim.options import PLAIN, AttentionOptions

BACKENDS = {"flashinfer_cuda_core": "cuda_core", "flashinfer_tensor_core": "tensor_core", "xqa": "xqa"}


class RouteUnavailable(RuntimeError):
    """This machine cannot run the route; the message says why."""


def missing_routes(
    shape: DecodeShape, *, needs_lse: bool = False, options: AttentionOptions = PLAIN, layout: str = "HND"
) -> dict[str, str]:
    """FlashInfer's routes that cannot run the shape with these options here, each with the reason."""
    if not fi.installed():
        return dict.fromkeys(BACKENDS, "FlashInfer is not installed")
    return {
        route: reason
        for route, backend in BACKENDS.items()
        if (reason := _why_not(route, backend, shape, needs_lse, options, layout)) is not None
    }


def _why_not(
    route: str, backend: str, shape: DecodeShape, needs_lse: bool, options: AttentionOptions, layout: str
) -> str | None:
    reason = fi.supports(shape, backend)
    if reason is not None:
        return reason
    unserved = [name for name in asked(shape, options) if name not in SERVED[route].options]
    if route == "xqa" and options.query_tokens > 1:
        unserved.append("query_tokens without a mask made for every step")
    if unserved:
        return f"it does not serve {', '.join(unserved)}"
    if layout != "HND":
        return f"it is driven on HND pages, not {layout}"
    return "it gives no LSE" if needs_lse and route == "xqa" else None


def available_routes(
    shape: DecodeShape, *, needs_lse: bool = False, options: AttentionOptions = PLAIN, layout: str = "HND"
) -> tuple[str, ...]:
    """The routes, in the order of pkvsim's ROUTES, that can run the shape here as far as one can tell beforehand."""
    missing = missing_routes(shape, needs_lse=needs_lse, options=options, layout=layout)
    return tuple(route for route in ROUTES if route not in missing)


def build(
    route: str,
    shape: DecodeShape,
    dtype: str = "float16",
    *,
    scale: float | None = None,
    options: AttentionOptions = PLAIN,
    layout: str = "HND",
) -> StepPlanner:
    """What plans and runs the route; a FlashInfer backend has run once, so that its kernels are known to build.

    Raises ValueError for an unknown route or a shape that none of our kernels serves, RouteUnavailable where
    FlashInfer cannot run it.
    """
    if route in OWN_ROUTES:
        from gpu.engine.schedule_engine import ScheduleEngine

        return ScheduleEngine(shape, dtype, route, scale=scale, options=options, layout=layout)
    if route not in BACKENDS:
        raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
    if scale is not None:
        raise ValueError(f"scale: expected None on route {route}, got {scale}")
    reason = missing_routes(shape, options=options, layout=layout).get(route)
    if reason is not None:
        raise RouteUnavailable(f"{route}: {reason}")
    try:
        theirs = FlashInferRoute(shape, dtype, BACKENDS[route], options)
        theirs.probe()
    except Exception as error:  # its kernels are built on demand, in ways of its own to fail
        reason = build_failure(error) or f"{type(error).__name__}: {error}"
        raise RouteUnavailable(f"{route}: {reason}".splitlines()[0][:200]) from error
    return theirs
