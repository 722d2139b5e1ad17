"""What FlashAttention's functions refuse: by name, and before a token of the caches is written."""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from flash_on_cpu import serve_flash_on_cpu  # noqa: E402

from gpu.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 32
META = {"device": "meta"}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    return serve_flash_on_cpu(monkeypatch)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("given", "words"), [
    ({"q": (0, 1, HEADS, DIM)}, "q: expected"), ({"q": (2, 1, 3, DIM)}, "q: expected a multiple of k_cache's 2 heads"),
    ({"v_cache": torch.zeros(8, 16, KV_HEADS, DIM)}, "v_cache: expected k_cache's dtype"),
    ({"block_table": torch.zeros(2, 4, dtype=torch.int32, **META)}, "block_table: expected int32 .* on cpu, got"),
    ({"cache_seqlens": torch.zeros(2, dtype=torch.int32, **META)}, "cache_seqlens: expected a number or int32"),
    ({"cache_seqlens": [5, 7]}, "cache_seqlens: expected"), ({"cache_seqlens": True}, "cache_seqlens: expected"),
    ({"block_table": None, "cache_batch_idx": torch.zeros(2, dtype=torch.int32, **META)}, "cache_batch_idx: expected"),
    ({"s_aux": torch.zeros(3)}, r"s_aux: expected \[4\] on cpu"), ({"s_aux": [0.0] * HEADS}, "s_aux: expected"),
    ({"softcap": -1.0}, "softcap: expected"), ({"softcap": float("nan")}, "softcap: expected"),
    ({"softmax_scale": float("nan")}, "softmax_scale: expected"), ({"softmax_scale": "x"}, "softmax_scale: expected"),
    ({"window_size": None}, "window_size: expected two"), ({"window_size": 4}, "window_size: expected two"),
    ({"rotary_cos": torch.ones(99, 64), "rotary_sin": torch.ones(99, 64)}, "rotary_cos: expected 1 to 16 columns"),
    ({"rotary_cos": torch.ones(99, 0), "rotary_sin": torch.ones(99, 0)}, "rotary_cos: expected 1 to 16 columns"),
    ({"rotary_cos": torch.ones(99, 8), "rotary_sin": torch.ones(99, 8, **META)}, "rotary_sin: expected .* on cpu"),
])
def test_a_decode_step_is_refused_before_it_writes(queries, given, words):
    batch, _, heads, dim = given.get("q", (2, 1, HEADS, DIM))
    k_cache, v_cache = normal(8, 16, KV_HEADS, DIM), normal(8, 16, KV_HEADS, DIM)
    before = k_cache.clone()
    more = {"v_cache": v_cache, "block_table": torch.arange(8, dtype=torch.int32).view(2, 4), "cache_seqlens": ints(5, 7)}
    new = normal(2, queries, KV_HEADS, DIM)
    more |= {name: value for name, value in given.items() if name != "q"}
    with pytest.raises(ValueError, match=words):
        flash_attn_with_kvcache(normal(batch, queries, heads, dim), k_cache, k=new, v=new, causal=True, **more)
    assert torch.equal(k_cache, before)


def test_a_length_of_numpy_is_a_number():
    q, cache, table = normal(2, 1, HEADS, DIM), normal(8, 16, KV_HEADS, DIM), torch.arange(8, dtype=torch.int32).view(2, 4)
    found = [flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length, block_table=table) for length in (9, np.int64(9))]
    assert torch.equal(*found)


@pytest.mark.parametrize(("given", "words"), [
    ({"q": normal(5, 3, DIM)}, "q: expected a multiple of k's 2 heads"), ({"q": normal(5, HEADS, 16)}, "k: expected q's"),
    ({"k": normal(7, KV_HEADS, DIM).float()}, "k: expected q's dtype"), ({"v": normal(6, KV_HEADS, DIM)}, "v: expected k's"),
    ({"v": normal(7, 1, DIM)}, "v: expected k's"), ({"s_aux": torch.zeros(3)}, "s_aux: expected"), ({"q": None}, "q: expected"),
    ({"softcap": -1.0}, "softcap: expected"), ({"block_table": [[1]]}, "block_table: expected"),
    ({"cu_seqlens_q": ints(0, 2, 9)}, "cu_seqlens_q: expected ascending"), ({"window_size": None}, "window_size: expected"),
    ({"cu_seqlens_k": ints(0, 3, 9)}, "cu_seqlens_k: expected ascending"),
    ({"cu_seqlens_k": ints(0, 5, 3)}, "cu_seqlens_k: expected ascending"),
])
def test_packed_prompts_that_do_not_fit(given, words):
    whole = {"q": normal(5, HEADS, DIM), "k": normal(7, KV_HEADS, DIM), "v": normal(7, KV_HEADS, DIM),
             "cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 3, 7), "max_seqlen_q": 3, "max_seqlen_k": 4}
    with pytest.raises(ValueError, match=words):
        flash_attn_varlen_func(**(whole | given))


@pytest.mark.parametrize(("k", "v", "words"), [
    ((3, 5), (3, 5), "k: expected q's batch_size"), ((2, 5), (2, 4), "v: expected k's"),
])
def test_sequences_of_one_length_that_do_not_fit(k, v, words):
    with pytest.raises(ValueError, match=words):
        flash_attn_func(normal(2, 3, HEADS, DIM), normal(*k, KV_HEADS, DIM), normal(*v, KV_HEADS, DIM))
    with pytest.raises(ValueError, match="q: expected q's batch_size, at least 1"):
        flash_attn_func(*(normal(0, 3, HEADS, DIM) for _ in range(3)))
