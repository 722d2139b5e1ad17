"""FlashInfer's backends as routes of a step: with DecodeEngine's checks, streams and array libraries."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run
from gpu.routes import flashinfer_decode as fi
from pkvsim import DecodeShape
from pkvsim.options import PLAIN, AttentionOptions

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 1024  # length of the one row that shows whether a backend's kernels can be built


class FlashInferRoute:
    """A FlashInfer backend with DecodeEngine's checks, streams and array libraries."""

    __slots__ = (
        "shape",
        "dtype",
        "backend",
        "options",
        "_theirs",
        "_batch_size",
        "_unchecked_ids",
        "_checked_run",
        "_device",
        "_library",
    )

    def __init__(self, shape: DecodeShape, dtype: str, backend: str, options: AttentionOptions = PLAIN) -> None:
        import torch

        self.shape, self.dtype, self.backend, self.options = shape, dtype, backend, options
        self._theirs = fi.FlashInferDecode(shape, dtype, backend, options)
        self._batch_size = 0
        self._unchecked_ids: tuple[StepTables, np.ndarray] | None = None
        self._checked_run: list | None = None
        self._device = torch.cuda.current_device()
        self._library: str | None = None  # whose arrays and streams the runs use; known from the first run on

    def probe(self) -> None:
        """Runs one short row; raises whatever FlashInfer raises."""
        import torch

        dtype, shape = getattr(torch, self.dtype), self.shape
        tokens = () if self.options.query_tokens == 1 else (self.options.query_tokens,)
        q = torch.zeros((1, *tokens, shape.num_q_heads, shape.head_dim), dtype=dtype, device="cuda")
        sinks = torch.zeros(shape.num_q_heads, device="cuda") if self.options.sinks else None
        columns = -(-PROBE_TOKENS // shape.page_size)
        pages = torch.zeros(
            (2, columns, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype=dtype, device="cuda"
        )
        self.plan(StepTables(np.array([PROBE_TOKENS], np.int32), np.arange(columns, dtype=np.int32)[None]))
        self.run(Run(q, pages[0], pages[1], out=torch.empty_like(q), sinks=sinks))
        torch.cuda.synchronize()
        self._library = None

    def plan(
        self,
        tables: StepTables,
        *,
        splits: np.ndarray | int | None = None,
        packed: fi.PackedTable | None = None,
        validate: bool = False,
    ) -> None:
        """As DecodeEngine.plan, of a block table. splits: what only our own routes read."""
        views = tables.views()
        lens, table = views["seq_lens"], views["block_table"]
        checks.check_plan(views, self._device)
        if packed is None or validate:
            host_lens = arrays.to_host("seq_lens", tables.seq_lens)
            checks.check_lengths(host_lens, self.shape.page_size, table.shape[1])
        self._unchecked_ids = (tables.on_host(page_ids=True), host_lens) if validate else None
        if self._batch_size != table.shape[0]:
            self._checked_run = None
        self._batch_size = table.shape[0]
        libraries = [library for library in ("torch", "cupy") if library in (lens.library, table.library)]
        with _torch_on_stream(libraries[0] if libraries else self._library, self._device) as stream:
            if packed is None:
                packed = fi.pack_table(host_lens, tables.block_table, page_size=self.shape.page_size)
            self._theirs.plan_packed(packed)
            if self._library is None:
                stream.synchronize()  # the first run may be on another stream

    def run(self, run: Run) -> tuple[object, object | None]:
        """As DecodeEngine.run, but the LSE is made only where `lse` is given (XQA: ValueError)."""
        q, k_pages, v_pages, out, lse, _, sinks, *_ = run
        if lse is not None and self.backend == "xqa":
            raise ValueError("lse: expected None on route xqa, which gives no LSE")
        if v_pages is None:
            k_pages, v_pages = arrays.split_combined(k_pages)
        if out is None:
            out = arrays.empty_like(q, arrays.shape_of("q", q), self.dtype)
        given = (("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("out", out), ("lse", lse), ("sinks", sinks))
        _, keys = arrays.fingerprints(array for _, array in given)
        if keys != self._checked_run:
            views = {name: arrays.view(name, array) for name, array in given if array is not None}
            checks.check_run(self.shape, self.dtype, self.options, "HND", self._batch_size, self._device, views)
            self._checked_run, self._library = keys, views["q"].library
        if self._unchecked_ids is not None:
            checks.check_page_ids(*self._unchecked_ids, self.shape.page_size, k_pages.shape[0])
            self._unchecked_ids = None
        with _torch_on_stream(self._library, self._device):
            _, found = self._theirs.run(q, k_pages, v_pages, fi.as_torch(out), return_lse=lse is not None, sinks=sinks)
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
