"""Evictions of the GPU's pools on a fake GPU: tables, pages and lengths reach the kernels as the host knows them."""
from __future__ import annotations

import numpy as np
import pytest
from evicting_rows import MAX_LEN, ROWS, SHAPE, EvictingRows
from fake_gpu import fake_gpu

from pkvsim.selection.evictions import METHODS


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("per_head", [False, True])
def test_any_order(gpu, per_head: bool) -> None:
    pool, rng = EvictingRows(per_head=per_head, layers=2 if per_head else 1), np.random.default_rng(0)
    pool.begin()
    full = len(pool.free_pages)
    for turn in range(60):
        seed = int(rng.integers(2**32))
        rows, unused = pool.rows, pool.unused
        row = int(rng.choice(rows)) if rows else None
        if unused and (not rows or rng.random() < 0.2):
            pool.open(unused[0])
            pool.grow(unused[0], int(rng.integers(20, 100)), seed)
        elif unused and rng.random() < 0.15:
            pool.fork(row, unused[0])
        elif rng.random() < 0.5:
            pool.grow(row, int(rng.choice([1, 40])), seed)
        elif rng.random() < 0.4:
            pool.evict(row, METHODS[turn % len(METHODS)], seed)
        elif rng.random() < 0.7:
            pool.select(seed, evict=row)
        else:
            pool.free(row)
        pool.decode(seed)
    assert len(pool.free_pages) < full
    pool.begin()
    assert len(pool.free_pages) == full


def test_refusals_change_nothing(gpu) -> None:
    pool = EvictingRows(per_head=True, layers=2)
    pool.begin()
    pool.open(1)
    pool.grow(1, 70, seed=0)
    cache, before = pool.cache, (pool.free_pages, pool.cache.lengths(1).tolist())
    assert before[1][1] == [70, 70] and cache.lengths(0).sum() == 0
    with pytest.raises(ValueError, match="^kept: expected ascending places below the 5 pages"):
        cache.evict(1, 1, [[0, 1], [0, 5]])
    with pytest.raises(ValueError, match="^kept: expected places of 2 KV heads, got 1"):
        cache.evict(1, 1, [[0]])
    with pytest.raises(ValueError, match="^layer: expected"):
        cache.evict(2, 1, [[0], [0]])
    with pytest.raises(ValueError, match="^rows: expected rows in"):
        cache.lanes(0, [ROWS])
    with pytest.raises(ValueError, match="^row: expected an unused row"):
        cache.fork(1, 1)
    assert (pool.free_pages, cache.lengths(1).tolist()) == before
    assert len(cache.evict(1, 1, [[0, 4], [2]])) == 7
    assert cache.lengths(1)[1].tolist() == [16 + 6, 16]
    bad = gpu.array(np.zeros((2, 3, 1, SHAPE.head_dim), np.float16))
    with pytest.raises(ValueError, match="^k, v: expected"):
        cache.pool.fill_rows([0], bad, bad)
    with pytest.raises(ValueError, match="at most"):
        too_long = gpu.array(np.zeros((1, MAX_LEN + 1, 1, SHAPE.head_dim), np.float16))
        cache.pool.fill_rows([cache.lanes(0, [1])[0]], too_long, too_long)
