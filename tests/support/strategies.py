"""What the property-based tests draw from: shapes, ragged batches and pools with holes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pkvsim import DecodeShape

POISON_PAGE = 0x7FFFFFFF  # an id no pool has


@st.composite
def shapes(draw: st.DrawFn) -> DecodeShape:
    kv_heads = draw(st.integers(1, 4))
    return DecodeShape(
        num_q_heads=kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 4, 16])),
        page_size=draw(st.sampled_from([1, 3, 16, 32])),
    )


def seq_lens(max_rows: int = 6, max_tokens: int = 400) -> st.SearchStrategy[list[int]]:
    """Ragged rows, zero-length ones and tile edges included."""
    edges = [n for n in (0, 1, 31, 32, 33, 64, 96, 128) if n <= max_tokens]
    return st.lists(st.one_of(st.sampled_from(edges), st.integers(0, max_tokens)), min_size=0, max_size=max_rows)


class Case:
    """q, pages and tables for one batch: NaN in every page and token no row owns, poisoned spare entries."""

    def __init__(self, shape: DecodeShape, lens: list[int], seed: int, dtype: type = np.float64) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.lens = shape, np.array(lens, np.int32)
        counts = -(-self.lens // shape.page_size)
        num_pages = int(counts.sum()) + 3
        ids = rng.permutation(num_pages)
        self.table = np.full((len(lens), int(counts.max(initial=0)) + 2), POISON_PAGE, np.int32)
        pool = (num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
        self.k = np.full(pool, np.nan, dtype)
        self.v = np.full(pool, np.nan, dtype)
        next_id = 0
        for row, count in enumerate(counts):
            owned = ids[next_id : next_id + count]
            next_id += count
            self.table[row, :count] = owned
            for index, page in enumerate(owned):
                used = min(shape.page_size, int(self.lens[row]) - index * shape.page_size)
                self.k[page, :, :used] = rng.standard_normal((shape.num_kv_heads, used, shape.head_dim))
                self.v[page, :, :used] = rng.standard_normal((shape.num_kv_heads, used, shape.head_dim))
        self.q = (rng.standard_normal((len(lens), shape.num_q_heads, shape.head_dim)) * 3).astype(dtype)

    def args(self) -> tuple:
        return self.shape, self.q, self.k, self.v, self.table, self.lens
