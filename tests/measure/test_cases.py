"""Laid out, checked, timed: a benchmark's step on a pool of PyTorch's on the CPU."""
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu.measure import cases  # noqa: E402
from gpu.measure.pools import BenchPool  # noqa: E402
from pkvsim import DecodeShape  # noqa: E402

SHAPE = DecodeShape(4, 2, 64, 4)
PAGE_ELEMENTS = 2 * 4 * 64


def make_pool(pages: int) -> BenchPool:
    pool = BenchPool.__new__(BenchPool)
    pool.flat = torch.arange(2 * pages * PAGE_ELEMENTS).remainder(2048).to(torch.float16)
    return pool


@settings(max_examples=40, deadline=None)
@given(lens=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any), seed=st.integers(0, 9),
       min_layers=st.integers(1, 3), pages=st.integers(700, 900))
def test_layers_share_the_table_and_no_page(lens, seed, min_layers, pages) -> None:
    pool, lens = make_pool(pages), np.array(lens, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "l2_bytes", lambda: 1 << 12)
        case = cases.lay_out(pool, SHAPE, lens, seed=seed, min_layers=min_layers)
        again = cases.lay_out(pool, SHAPE, lens, seed=seed, min_layers=min_layers)
    assert torch.equal(case.q, again.q) and np.array_equal(case.block_table, again.block_table)
    assert case.kv_bytes == int(lens.sum()) * 2 * 64 * 2 * 2 and len(case.layers) >= min_layers
    owned = [case.block_table[row, : -(-int(length) // 4)] for row, length in enumerate(lens)]
    ids = np.concatenate(owned)
    assert len(set(ids.tolist())) == len(ids)
    addresses = [k[int(page)].data_ptr() for k, _ in case.layers for page in ids]
    assert len(set(addresses)) == len(ids) * len(case.layers)
    assert all(v[0].data_ptr() - k[0].data_ptr() == pages * PAGE_ELEMENTS * 2 for k, v in case.layers)


def test_what_an_engine_leaves_out_is_found(monkeypatch) -> None:
    monkeypatch.setattr(cases, "l2_bytes", lambda: 1 << 12)
    case = cases.lay_out(make_pool(700), SHAPE, np.array([9, 30], np.int32), seed=1)

    def right(k_pages, v_pages, out) -> None:
        assert k_pages is case.layers[0][0] and v_pages is case.layers[0][1]
        out.copy_(case.q)

    def half(k_pages, v_pages, out) -> None:
        out[:1] = case.q[:1]

    assert cases.difference(case.result(right), case.q) == 0.0
    assert math.isnan(cases.difference(case.result(half), case.q))
    assert not cases.difference(case.result(half), case.q) < 1e9


def test_every_layer_is_timed(monkeypatch) -> None:
    monkeypatch.setattr(cases, "l2_bytes", lambda: 1 << 12)
    case, read = cases.lay_out(make_pool(700), SHAPE, np.array([9], np.int32), seed=1), []

    def timed(run, *, variants, repeats):
        for layer in range(variants):
            run(layer)
        return repeats

    monkeypatch.setattr(cases, "graph_time_us", timed)
    assert case.time(lambda k_pages, v_pages, out: read.append(k_pages.data_ptr()), repeats=7) == 7
    assert read == [k.data_ptr() for k, _ in case.layers] and len(read) >= 2
