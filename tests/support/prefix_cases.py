"""Block tables whose rows share leading pages in trees of all shapes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


@st.composite
def tables(draw: st.DrawFn, max_rows: int = 10, max_pages: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(table [rows, max_pages] int32, full pages [rows], tokens beyond them [rows]).

    A row follows an earlier one for some pages, then goes its own way; ids are few, so that rows also meet by chance,
    at the same place and after different ones.
    """
    count = draw(st.integers(1, max_rows))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    table = rng.integers(0, draw(st.sampled_from([2, 3, 10**6])), (count, max_pages), dtype=np.int32)
    for row in range(1, count):
        source, depth = draw(st.integers(0, row - 1)), draw(st.integers(0, max_pages))
        table[row, :depth] = table[source, :depth]
    lengths = st.one_of(st.just(max_pages), st.integers(0, max_pages))
    pages = np.array(draw(st.lists(lengths, min_size=count, max_size=count)), np.int64)
    return table, pages, rng.integers(0, 20, count)
