"""The paged pool on the GPU: what is appended is what is read, through growth, free and reuse."""
from __future__ import annotations

import cupy
import numpy as np
import pytest
import torch

from gpu import PagedKVCache
from pkvsim import DecodeShape

SHAPE = DecodeShape(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=3)


@pytest.mark.parametrize("combined", (False, True))
def test_tokens_come_back(combined: bool) -> None:
    rng = np.random.default_rng(0)
    cache = PagedKVCache(SHAPE, num_pages=40, max_batch=4, max_seq_len=40, combined=combined)
    kept: dict[int, list[np.ndarray]] = {}
    for _ in range(120):
        if len(kept) < 4:
            row = cache.allocate()
            tokens = rng.standard_normal((int(rng.integers(1, 12)), 2, 2, 64)).astype(
                np.float16
            )  # [T, k and v, Hkv, d]
            cache.fill(row, cupy.asarray(tokens[:, 0]), cupy.asarray(tokens[:, 1]))
            kept[row] = list(tokens)
        rows = sorted(kept)
        token = rng.standard_normal((len(rows), 2, 2, 64)).astype(np.float16)
        cache.append(rows, cupy.asarray(token[:, 0]), cupy.asarray(token[:, 1]))
        for row, new in zip(rows, token):
            kept[row].append(new)
        seq_lens, table = (array.get() for array in cache.device_tables())
        for row in rows:
            assert seq_lens[row] == len(kept[row])
            pages = table[row, :-(-len(kept[row]) // 3)]
            for which, pool in enumerate((cache.k_pages, cache.v_pages)):
                found = pool.get()[pages].transpose(0, 2, 1, 3).reshape(-1, 2, 64)[:len(kept[row])]
                np.testing.assert_array_equal(found, np.stack(kept[row])[:, which])
        for row in [row for row in rows if len(kept[row]) > 25]:
            cache.free(row)
            del kept[row]


def test_errors_leave_the_pool_as_it_was() -> None:
    cache = PagedKVCache(SHAPE, num_pages=2, max_batch=2, max_seq_len=30)
    row = cache.allocate()
    good = cupy.ones((4, 2, 64), dtype=cupy.float16)
    cache.fill(row, good, good)
    for k, match in ((good, "out of pages"), (good.astype(cupy.float32), "k:"), (good[:, :1], "k:")):
        with pytest.raises(ValueError, match=match):
            cache.fill(row, k, good)
    assert cache.seq_lens[row] == 4 and cache.num_free_pages == 0
    cache.free(row)
    assert cache.num_free_pages == 2


def test_tables_are_ordered_with_torchs_stream() -> None:
    """A read queued before a change sees what was there, one queued after it what is there now, none waited for."""
    cache = PagedKVCache(SHAPE, num_pages=40, max_batch=2, max_seq_len=300, library="torch")
    row = cache.allocate()
    lens, table = (torch.from_dlpack(array) for array in cache.device_tables())
    torch.cuda.synchronize()
    seen, expected = [], []
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for count in (3, 1, 40):
            cache.reserve([row], [count])
            cache.device_tables()
            seen.append((lens.clone(), table.clone()))
            expected.append((cache.seq_lens.copy(), cache.block_table.copy()))
    torch.cuda.synchronize()
    for got, wanted in zip(seen, expected):
        for array, host in zip(got, wanted):
            assert (array.cpu().numpy() == host).all()


def test_an_unknown_library_is_named() -> None:
    with pytest.raises(ValueError, match="^library: expected cupy or torch"):
        PagedKVCache(SHAPE, num_pages=4, max_batch=1, max_seq_len=30, library="numpy")
