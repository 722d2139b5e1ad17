"""One engine per route behind the same plan() and run(): ours, and FlashInfer's backends where they are installed."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpu import arrays
from gpu import flashinfer as fi
from gpu import validate as checks
from pkvsim import DecodeShape
from pkvsim.options import PLAIN
from pkvsim.route_model import OWN_ROUTES, ROUTES

if TYPE_CHECKING:
    import torch

BACKENDS = {"flashinfer_cuda_core": "cuda_core", "flashinfer_tensor_core": "tensor_core", "xqa": "xqa"}
PROBE_TOKENS = 1024  # length of the one row that shows whether a backend's kernels can be built


class RouteUnavailable(RuntimeError):
    """This machine cannot run the route; the message says why."""


class RouteEngine(Protocol):
    """What a route is driven by."""

    def plan(
        self,
        seq_lens: object,
        block_table: object,
        *,
        splits: np.ndarray | int | None = None,
        packed: fi.PackedTable | None = None,
        validate: bool = False,
    ) -> None:
        """Plans a step. splits: of split and workqueue. packed: the table in FlashInfer's form, if at hand."""

    def run(
        self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None
    ) -> tuple[object, object | None]:
        """Attention of the planned step: (out, lse)."""


Build = Callable[[str, DecodeShape, str], RouteEngine]


def missing_routes(shape: DecodeShape, *, needs_lse: bool = False) -> dict[str, str]:
    """FlashInfer's routes that cannot run the shape here, each with the reason."""
    if not fi.installed():
        return dict.fromkeys(BACKENDS, "FlashInfer is not installed")
    reasons = {route: fi.supports(shape, backend) for route, backend in BACKENDS.items()}
    if needs_lse:
        reasons["xqa"] = reasons["xqa"] or "it gives no LSE"
    return {route: reason for route, reason in reasons.items() if reason is not None}


def available_routes(shape: DecodeShape, *, needs_lse: bool = False) -> tuple[str, ...]:
    """The routes, in the order of pkvsim's ROUTES, that can run the shape here as far as one can tell beforehand."""
    missing = missing_routes(shape, needs_lse=needs_lse)
    return tuple(route for route in ROUTES if route not in missing)


def build(route: str, shape: DecodeShape, dtype: str = "float16", *, scale: float | None = None) -> RouteEngine:
    """An engine of the route; a FlashInfer backend has run once, so that its kernels are known to build.

    Raises ValueError for an unknown route or a shape that none of our kernels serves, RouteUnavailable where
    FlashInfer cannot run it.
    """
    if route in OWN_ROUTES:
        return OwnEngine(shape, dtype, route, scale=scale)
    if route not in BACKENDS:
        raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
    if scale is not None:
        raise ValueError(f"scale: expected None on route {route}, got {scale}")
    reason = missing_routes(shape).get(route)
    if reason is not None:
        raise RouteUnavailable(f"{route}: {reason}")
    try:
        engine = FlashInferEngine(shape, dtype, BACKENDS[route])
        engine.probe()
    except Exception as error:  # its kernels are built on demand, in ways of its own to fail
        raise RouteUnavailable(f"{route}: {type(error).__name__}: {error}".splitlines()[0][:200]) from error
    return engine


class OwnEngine:
    """A DecodeEngine of one schedule whose split counts may change with every plan."""

    __slots__ = ("engine",)

    def __init__(self, shape: DecodeShape, dtype: str, schedule: str, *, scale: float | None = None) -> None:
        from gpu.engine import DecodeEngine

        self.engine = DecodeEngine(shape, dtype, schedule, scale=scale)

    def plan(
        self,
        seq_lens: object,
        block_table: object,
        *,
        splits: np.ndarray | int | None = None,
        packed: fi.PackedTable | None = None,
        validate: bool = False,
    ) -> None:
        if splits is not None:
            self.engine.splits = splits
        self.engine.plan(seq_lens, block_table, validate=validate)

    def run(
        self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None
    ) -> tuple[object, object | None]:
        return self.engine.run(q, k_pages, v_pages, out=out, lse=lse)


class FlashInferEngine:
    """A FlashInfer backend with DecodeEngine's checks, streams and array libraries."""

    __slots__ = (
        "shape",
        "dtype",
        "backend",
        "_theirs",
        "_batch_size",
        "_unchecked_ids",
        "_checked_run",
        "_device",
        "_library",
    )

    def __init__(self, shape: DecodeShape, dtype: str, backend: str) -> None:
        import torch

        self.shape, self.dtype, self.backend = shape, dtype, backend
        self._theirs = fi.FlashInferDecode(shape, dtype, backend)
        self._batch_size = 0
        self._unchecked_ids: tuple[np.ndarray, np.ndarray] | None = None
        self._checked_run: tuple | None = None
        self._device = torch.cuda.current_device()
        self._library: str | None = None  # whose arrays and streams the runs use; known from the first run on

    def probe(self) -> None:
        """Runs one short row; raises whatever FlashInfer raises."""
        import torch

        dtype, shape = getattr(torch, self.dtype), self.shape
        q = torch.zeros((1, shape.num_q_heads, shape.head_dim), dtype=dtype, device="cuda")
        columns = -(-PROBE_TOKENS // shape.page_size)
        pages = torch.zeros(
            (2, columns, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype=dtype, device="cuda"
        )
        self.plan(np.array([PROBE_TOKENS], np.int32), np.arange(columns, dtype=np.int32)[None])
        self.run(q, pages[0], pages[1], out=torch.empty_like(q))
        torch.cuda.synchronize()
        self._library = None

    def plan(
        self,
        seq_lens: object,
        block_table: object,
        *,
        splits: np.ndarray | int | None = None,
        packed: fi.PackedTable | None = None,
        validate: bool = False,
    ) -> None:
        lens, table = arrays.view("seq_lens", seq_lens), arrays.view("block_table", block_table)
        checks.check_plan(lens, table, self._device)
        if packed is None or validate:
            host_lens = arrays.to_host("seq_lens", seq_lens)
            checks.check_lengths(host_lens, self.shape, table.shape[1])
        self._unchecked_ids = (arrays.to_host("block_table", block_table), host_lens) if validate else None
        if self._batch_size != table.shape[0]:
            self._checked_run = None
        self._batch_size = table.shape[0]
        libraries = [library for library in ("torch", "cupy") if library in (lens.library, table.library)]
        with _torch_on_stream(libraries[0] if libraries else self._library, self._device) as stream:
            if packed is None:
                packed = fi.pack_table(host_lens, block_table, page_size=self.shape.page_size)
            self._theirs.plan_packed(packed)
            if self._library is None:
                stream.synchronize()  # the first run may be on another stream

    def run(
        self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None
    ) -> tuple[object, object | None]:
        """As DecodeEngine.run, but the LSE is made only where `lse` is given (XQA: ValueError)."""
        if lse is not None and self.backend == "xqa":
            raise ValueError("lse: expected None on route xqa, which gives no LSE")
        if v_pages is None:
            k_pages, v_pages = arrays.split_combined(k_pages)
        if out is None:
            described = arrays.view("q", q)
            out = arrays.empty_like(q, described, described.shape, self.dtype)
        given = (("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("out", out), ("lse", lse))
        keys = tuple(arrays.fingerprint(array)[1] for _, array in given)
        if keys != self._checked_run:
            views = {name: arrays.view(name, array) for name, array in given if array is not None}
            checks.check_run(self.shape, self.dtype, PLAIN, "HND", self._batch_size, self._device, views)
            self._checked_run, self._library = keys, views["q"].library
        if self._unchecked_ids is not None:
            checks.check_page_ids(*self._unchecked_ids, self.shape.page_size, k_pages.shape[0])
            self._unchecked_ids = None
        with _torch_on_stream(self._library, self._device):
            _, found = self._theirs.run(q, k_pages, v_pages, fi.as_torch(out), return_lse=lse is not None)
            if lse is not None:
                fi.as_torch(lse).copy_(found)
        return out, lse


@contextlib.contextmanager
def _torch_on_stream(library: str | None, device: int) -> Iterator[torch.cuda.Stream]:
    """Makes torch work on CuPy's current stream where the caller's arrays are CuPy's."""
    import torch

    if library != "cupy":
        yield torch.cuda.current_stream(device)
        return
    handle = arrays.current_stream("cupy", device)
    # CuPy's null stream is torch's default one, which need not be torch's current one.
    stream = torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):  # which itself yields nothing
        yield stream
