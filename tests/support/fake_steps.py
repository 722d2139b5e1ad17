"""Random decode steps in every form that their arrays may have, for the fake GPU, and what comes out of them."""
from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from fake_gpu import FakeGpu

from pkvsim import AttentionOptions, DecodeShape, reference

UNUSED = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Step:
    """NumPy arrays of a step; NaN in every page that no row owns."""

    shape: DecodeShape
    options: AttentionOptions
    q: np.ndarray  # [batch_size, (query_tokens,) num_q_heads, head_dim]
    k_pages: np.ndarray  # [num_pages, num_kv_heads, page_size, head_dim]
    v_pages: np.ndarray
    block_table: np.ndarray  # [batch_size, max_pages] int32
    seq_lens: np.ndarray  # [batch_size] int32
    sinks: np.ndarray | None

    def expected(self, *, scale: float | None = None, query_lens: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """float64 (out, lse)."""
        wide = (array.astype(np.float64) for array in (self.q, self.k_pages, self.v_pages))
        return reference.attention(
            self.shape,
            *wide,
            self.block_table,
            self.seq_lens,
            scale=scale,
            options=self.options,
            sinks=self.sinks,
            query_lens=query_lens,
        )

    def csr(self) -> dict[str, np.ndarray]:
        """indptr, indices, last_page_len."""
        page_size = self.shape.page_size
        pages = -(-self.seq_lens // page_size)
        owned = np.arange(self.block_table.shape[1])[None, :] < pages[:, None]
        last = np.where(self.seq_lens > 0, (self.seq_lens - 1) % page_size + 1, 0)
        return {"indptr": np.concatenate([[0], np.cumsum(pages)]).astype(np.int32),
                "indices": self.block_table[owned], "last_page_len": last.astype(np.int32)}

    def tables(self, form: str, *, ids: str = "int32") -> dict[str, np.ndarray]:
        """Arguments of plan(): form "block table", "csr and lengths" or "csr and last pages"."""
        if form == "block table":
            return {"seq_lens": self.seq_lens, "block_table": self.block_table.astype(ids)}
        csr = self.csr() | {"indices": self.csr()["indices"].astype(ids)}
        if form == "csr and last pages":
            return csr
        return {"seq_lens": self.seq_lens, "indptr": csr["indptr"], "indices": csr["indices"]}


def make_step(shape: DecodeShape, lens: list[int], *, dtype: str = "float16", seed: int = 0,
              options: AttentionOptions = AttentionOptions()) -> Step:
    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    seq_lens = np.array(lens, np.int32)
    pages = -(-seq_lens.astype(np.int64) // shape.page_size)
    ids = rng.permutation(int(pages.sum()) + 3).astype(np.int32)
    table = np.full((len(lens), int(pages.max(initial=0)) + 2), UNUSED, np.int32)
    table[np.arange(table.shape[1])[None, :] < pages[:, None]] = ids[:pages.sum()]
    pools = []
    for width in (shape.head_dim, options.value_dim(shape)):
        pool = np.full((len(ids), shape.num_kv_heads, shape.page_size, width), np.nan)
        for row, length in enumerate(lens):
            for token in range(length):
                page = table[row, token // shape.page_size]
                pool[page, :, token % shape.page_size] = rng.standard_normal((shape.num_kv_heads, width))
        pools.append(pool.astype(kind))
    tokens = () if options.query_tokens == 1 else (options.query_tokens,)
    q = rng.standard_normal((len(lens), *tokens, shape.num_q_heads, shape.head_dim)).astype(kind)
    sinks = rng.standard_normal(shape.num_q_heads).astype(np.float32) if options.sinks else None
    return Step(shape, options, q, *pools, table, seq_lens, sinks)


def strided(pages: np.ndarray, *, spread: int) -> np.ndarray:
    """The same pages as a view of a larger array, `spread` pages apart."""
    wide = np.zeros((len(pages) * spread, *pages.shape[1:]), pages.dtype)
    wide[::spread] = pages
    return wide[::spread]


def run_arguments(gpu: FakeGpu, step: Step, *, layout: str = "HND", spread: int = 1) -> dict[str, object]:
    """Arguments of run() on the fake GPU."""
    pools = [strided(pool if layout == "HND" else np.ascontiguousarray(pool.swapaxes(1, 2)), spread=spread)
             for pool in (step.k_pages, step.v_pages)]
    out = np.full((*step.q.shape[:-1], step.options.value_dim(step.shape)), 7, step.q.dtype)
    lse = np.full(step.q.shape[:-1], 7, np.float32)
    arrays = {"q": step.q, "k_pages": pools[0], "v_pages": pools[1], "out": out, "lse": lse, "sinks": step.sinks}
    return {name: None if array is None else gpu.array(array) for name, array in arrays.items()}


def agrees(step: Step, run: dict[str, object], **how: object) -> None:
    """What run() wrote is the step's attention, rounded."""
    out, lse = step.expected(**how)
    np.testing.assert_allclose(run["out"].host.astype(np.float64), out, atol=3e-2, rtol=2e-2)
    np.testing.assert_allclose(run["lse"].host, lse, atol=1e-5, rtol=1e-5)
