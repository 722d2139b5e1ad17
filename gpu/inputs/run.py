"""What a planned step is run with, and the protocol of everything that plans and runs steps."""
from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from gpu.inputs.block_tables import StepTables


class Run(NamedTuple):
    """The arguments of DecodeEngine.run(), which says what each one is; arrays of CuPy or torch, all alike."""

    q: object  # [batch_size, (query_tokens,) num_q_heads, head_dim]
    k_pages: object  # [num_pages, num_kv_heads, page_size, head_dim], or a combined cache
    v_pages: object = None  # like k_pages; None of a combined cache
    out: object = None  # like q, with V's head_dim
    lse: object = None  # [batch_size, (query_tokens,) num_q_heads] float32
    scale: float | None = None
    sinks: object = None  # [num_q_heads] float32
    query_lens: object = None  # [batch_size] int32
    k_scale: object = None
    v_scale: object = None
    selected: object = None  # PageList: the pages that each (row, KV head) reads
    page_lse: object = None  # [batch_size, num_kv_heads, tiles, (query_tokens,) group_size] float32, written


class StepPlanner(Protocol):
    """A route of a step: a schedule of ours or a backend of FlashInfer's."""

    def plan(self, tables: StepTables, *, splits: np.ndarray | int | None = None, packed: Any = None,
             validate: bool = False) -> None:
        """Plans a step. splits: of split and workqueue. packed: the tables in FlashInfer's form, where at hand."""

    def run(self, run: Run) -> tuple[object, object | None]:
        """Attention of the planned step: (out, lse)."""
