"""ShardedCache on a fake GPU: every token lies on its rank, and what is refused changes nothing."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import DecodeShape
from pkvsim.schedule.shares import PageShares, interleaved

SHAPE = DecodeShape(4, 2, 32, 4)
TOKEN = SHAPE.num_kv_heads, SHAPE.head_dim


def make(shares: PageShares, *, dtype: str = "float16", num_pages: int = 40):
    from gpu.several.cache import ShardedCache
    from gpu.several.one_process import DeviceGroup

    return ShardedCache(SHAPE, DeviceGroup([0] * shares.num_ranks), num_pages=num_pages, max_batch=3, max_seq_len=60,
                        shares=shares, dtype=dtype)


def state(cache) -> list[bytes]:
    """Everything that a refused call must leave."""
    found = [cache.rows.seq_lens]
    for rank, pool in cache.pools.items():
        found += [pool.seq_lens, pool.block_table, cache.rows.ranks[rank].block_table, pool.k_pages.host, pool.v_pages.host]
    return [array.tobytes() for array in found]


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any), bf16=st.booleans(), data=st.data())
def test_every_token_lies_on_its_rank(gpu, parts, bf16, data) -> None:
    shares = PageShares(SHAPE.page_size, tuple(parts))
    cache = make(shares, dtype="bfloat16" if bf16 else "float16")
    element = np.dtype(ml_dtypes.bfloat16 if bf16 else np.float16)
    rng, wanted = np.random.default_rng(data.draw(st.integers(0, 99))), {}

    def tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(rng.standard_normal((count, *TOKEN)).astype(element) for _ in range(2))

    def on_ranks(array: np.ndarray) -> list:
        return [gpu.array(array) for _ in parts]

    for what in data.draw(st.lists(st.sampled_from(["open", "fill", "append", "free"]), min_size=1, max_size=12)):
        if what == "open" and len(wanted) < 3:
            wanted[cache.allocate()] = [], []
        elif what == "fill" and wanted:
            row = data.draw(st.sampled_from(sorted(wanted)))
            count = data.draw(st.integers(0, 60 - len(wanted[row][0])))
            k, v = tokens(count)
            cache.fill(row, on_ranks(k), on_ranks(v))
            wanted[row][0].extend(k), wanted[row][1].extend(v)
        elif what == "append":
            rows = [row for row in sorted(wanted) if len(wanted[row][0]) < 60]
            k, v = tokens(len(rows))
            cache.append(rows, on_ranks(k), on_ranks(v))
            for row, own_k, own_v in zip(rows, k, v):
                wanted[row][0].append(own_k), wanted[row][1].append(own_v)
        elif what == "free" and wanted:
            row = data.draw(st.sampled_from(sorted(wanted)))
            cache.free(row)
            del wanted[row]
    lens, tables = cache.device_tables()
    for row, (k, v) in wanted.items():
        of, place = shares.place(np.arange(-(-len(k) // SHAPE.page_size)))
        assert all(one.host[row] == len(k) for one in lens)
        for token in range(len(k)):
            page, slot = divmod(token, SHAPE.page_size)
            pool, at = cache.pools[int(of[page])], int(tables[int(of[page])].host[row, place[page]])
            assert (pool.k_pages.host[at, :, slot] == k[token]).all() and (pool.v_pages.host[at, :, slot] == v[token]).all()


REFUSED = [
    ("k", lambda array, good: (array(good), [array(good)] * 2)),  # no list
    ("k", lambda array, good: ([array(good)], [array(good)] * 2)),
    ("v", lambda array, good: ([array(good)] * 2, None)),
    (r"k\[1\]", lambda array, good: ([array(good), array(good[:-1])], [array(good)] * 2)),
    (r"v\[0\]", lambda array, good: ([array(good)] * 2, [array(good[:-1])] * 2)),
    (r"k\[0\]", lambda array, good: ([array(good.astype(np.float32))] * 2, [array(good)] * 2)),
    (r"k\[0\]", lambda array, good: ([good] * 2, [good] * 2)),  # on the host
    (r"k\[0\]", lambda array, good: ([array(good[:, :1])] * 2, [array(good)] * 2)),
    (r"v\[1\]", lambda array, good: ([array(good)] * 2, [array(good), array(good, device=1)])),
]


@pytest.mark.parametrize(("name", "arrays"), REFUSED, ids=range(len(REFUSED)))
def test_tokens_that_do_not_fit_change_nothing(gpu, name, arrays) -> None:
    cache, good = make(interleaved(2, SHAPE.page_size)), np.ones((3, *TOKEN), np.float16)
    for row in range(3):
        cache.allocate()
        cache.fill(row, [gpu.array(good)] * 2, [gpu.array(good)] * 2)
    before = state(cache)
    for call in (lambda k, v: cache.fill(0, k, v), lambda k, v: cache.append([0, 1, 2], k, v)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call(*arrays(gpu.array, good))
        assert state(cache) == before


@pytest.mark.parametrize("row", [-1, 1, 99])
def test_rows_that_are_not_open_change_nothing(gpu, row) -> None:
    cache, one = make(interleaved(2, SHAPE.page_size)), np.ones((1, *TOKEN), np.float16)
    cache.allocate()
    before = state(cache)
    for call in (lambda k: cache.fill(row, k, k), lambda k: cache.append([row], k, k), lambda k: cache.append(0, k, k),
                 lambda k: cache.append([0, 0], k, k), lambda _: cache.free(row)):
        with pytest.raises(ValueError, match="^rows?"):
            call([gpu.array(one)] * 2)
        assert state(cache) == before


def test_what_a_cache_is_made_with_is_checked(gpu) -> None:
    from pkvsim.memory.page_allocator import ShardedAllocator

    for length in (0, -5, 2.5, True):
        with pytest.raises(ValueError, match="^max_seq_len: expected an integer"):
            ShardedAllocator(interleaved(2, 16), num_pages=4, max_batch=1, max_seq_len=length)
    with pytest.raises(ValueError, match="^num_pages"):
        make(interleaved(2, SHAPE.page_size), num_pages=0)
    with pytest.raises(ValueError, match="^shares"):
        make(interleaved(2, 16))
