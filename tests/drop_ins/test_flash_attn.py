"""FlashAttention's functions against float64 attention of each row, on engines and writers of plain torch."""
from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from flash_on_cpu import attention, serve_flash_on_cpu  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch_paged import TorchEngine  # noqa: E402

from gpu import flash_attn  # noqa: E402
from gpu.drop_ins.torch_decode import EngineCache  # noqa: E402
from gpu.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: E402
from pkvsim.reference.append import rotate  # noqa: E402
from pkvsim.reference.rope import HALF, INTERLEAVED, Rope  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 32
SINKS = torch.linspace(-1, 2, HEADS)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    return serve_flash_on_cpu(monkeypatch)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def cache_of(lens: list[int], page_size: int, room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_table) of pages in any order, -1 where a row has none; `room` more tokens a row fit."""
    pages = [-(-(max(0, length) + room) // page_size) for length in lens]
    ids = torch.randperm(sum(pages) + 3).to(torch.int32)
    table = torch.full((len(lens), max(1, *pages)), -1, dtype=torch.int32)
    for row, count in enumerate(pages):
        table[row, :count], ids = ids[:count], ids[count:]
    shape = sum(pages) + 3, page_size, KV_HEADS, DIM
    return normal(*shape), normal(*shape), table


def row_of(cache: torch.Tensor, table: torch.Tensor, row: int, length: int) -> np.ndarray:
    """[length, kv_heads, dim] float64."""
    pages = table[row, :-(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:length].double().numpy()


def close(found: torch.Tensor, wanted: np.ndarray) -> None:
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=2e-3, atol=2e-3)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lens=st.lists(st.integers(-1, 40), min_size=1, max_size=4), page_size=st.sampled_from([3, 16, 256]),
       new=st.sampled_from([0, 1, 1, 3]), queries=st.sampled_from([1, 1, 3, 10]), causal=st.booleans(),
       left=st.sampled_from([-1, 0, 5]), softcap=st.sampled_from([0.0, 4.0]), sinks=st.booleans(),
       scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))
def test_every_row_is_its_own_attention(lens, page_size, new, queries, causal, left, softcap, sinks, scale, seed):
    torch.manual_seed(seed)
    k_cache, v_cache, table = cache_of(lens, page_size, new)
    before = k_cache.clone(), v_cache.clone()
    q, k, v = (normal(len(lens), count, heads, DIM) for count, heads in
               ((queries, HEADS), (new, KV_HEADS), (new, KV_HEADS)))
    options = {"softmax_scale": scale, "causal": causal, "window_size": (left, -1), "softcap": softcap,
               "s_aux": SINKS if sinks else None}
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, *((k, v) if new else ()), cache_seqlens=torch.tensor(lens, dtype=torch.int32),
        block_table=table, return_softmax_lse=True, **options)
    assert out.shape == q.shape and lse.shape == (len(lens), HEADS, queries)
    written = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    for row, length in enumerate(lens):
        total = max(0, length + new) if length >= 0 else max(0, new - 1)
        for token in range(new):
            at = length + token
            if at < 0:
                continue
            page, slot = table[row, at // page_size].long(), at % page_size
            written[page, slot] = True
            assert torch.equal(k_cache[page, slot], k[row, token]) and torch.equal(v_cache[page, slot], v[row, token])
        keys, values = (row_of(cache, table, row, total) for cache in (k_cache, v_cache))
        wanted = attention(q[row].double().numpy(), keys, values, scale=scale, causal=causal, window=(left, -1),
                           softcap=softcap, sinks=SINKS.numpy() if sinks else None)
        if not sinks or total:  # of a row without tokens, sinks alone are no attention
            close(out[row], wanted[0])
            close(lse[row], wanted[1])
    for cache, old in zip((k_cache, v_cache), before):
        assert torch.equal(cache[~written], old[~written])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rotates_as_it_writes(interleaved, tokens):
    torch.manual_seed(0)
    lens = [9, 0, -1, 33] if tokens == 1 else [9, 0, 4, 33]
    k_cache, v_cache, table = cache_of(lens, 16, tokens)
    q, k, v = (normal(len(lens), tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    angles = torch.outer(torch.arange(64.0), 10.0 ** -torch.arange(8.0).div(4))
    cos, sin, given = angles.cos().half(), angles.sin().half(), (q.clone(), k.clone())
    old = k_cache.clone()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin, torch.tensor(lens, dtype=torch.int32),
                                  block_table=table, causal=True, rotary_interleaved=interleaved)
    assert torch.equal(q, given[0]) and torch.equal(k, given[1])
    rope = Rope(style=INTERLEAVED if interleaved else HALF, cos_sin=torch.cat([cos, sin], 1).float().numpy())
    for row, length in enumerate(lens):
        if length < 0:
            assert not out[row].any()
            continue
        at = np.arange(length, length + tokens)
        turned = rotate(k[row].double().numpy(), at, rope)
        keys = np.concatenate([row_of(old, table, row, length), turned])
        assert np.allclose(row_of(k_cache, table, row, length + tokens)[length:], turned, atol=2e-3)
        close(out[row], attention(rotate(q[row].double().numpy(), at, rope), keys,
                                  row_of(v_cache, table, row, length + tokens), causal=True)[0])


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("tokens", [40, 7, 512])
def test_caches_without_a_table(indexed, tokens):
    torch.manual_seed(0)
    k_cache, v_cache = normal(5, tokens, KV_HEADS, DIM), normal(5, tokens, KV_HEADS, DIM)
    q, k, v = normal(3, 1, HEADS, DIM), normal(3, 1, KV_HEADS, DIM), normal(3, 1, KV_HEADS, DIM)
    which = torch.tensor([4, 0, 2], dtype=torch.int32) if indexed else None
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5, cache_batch_idx=which)
    for row, entry in enumerate([4, 0, 2] if indexed else range(3)):
        assert torch.equal(k_cache[entry, 5], k[row, 0])
        keys, values = k_cache[entry, :6].double().numpy(), v_cache[entry, :6].double().numpy()
        close(out[row], attention(q[row].double().numpy(), keys, values)[0])
    whole = flash_attn_with_kvcache(q, k_cache, v_cache, cache_batch_idx=which)
    first = k_cache[4 if indexed else 0].double().numpy(), v_cache[4 if indexed else 0].double().numpy()
    close(whole[0], attention(q[0].double().numpy(), *first)[0])


LENS = [(5, 5), (1, 30), (7, 9), (0, 4), (4, 0), (6, 2)]  # queries, keys


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"causal": True, "window_size": (3, 5)}, {"window_size": (2, 1)},
    {"causal": True, "softcap": 3.0, "softmax_scale": 0.5}, {"causal": True, "s_aux": SINKS}])
def test_packed_sequences(options, paged):
    torch.manual_seed(0)
    q_begins, k_begins = (torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32) for counts in zip(*LENS))
    q, k, v = (normal(int(begins[-1]), heads, DIM) for begins, heads in
               ((q_begins, HEADS), (k_begins, KV_HEADS), (k_begins, KV_HEADS)))
    rows = [(k[begin:end], v[begin:end]) for begin, end in zip(k_begins[:-1], k_begins[1:])]
    given = [k, v]
    if paged:
        k_pages, v_pages, table = cache_of([keys for _, keys in LENS], 4, 0)
        for row, new in enumerate(rows):
            for pages, tokens in zip((k_pages, v_pages), new):
                for place, token in enumerate(tokens):
                    pages[int(table[row, place // 4]), place % 4] = token
        given, options = [k_pages, v_pages], options | {"block_table": table}
    out, lse, _ = flash_attn_varlen_func(q, *given, q_begins, k_begins, 7, 30, return_attn_probs=True, **options)
    names = {"softmax_scale": "scale", "window_size": "window", "s_aux": "sinks"}
    wanted = {names.get(name, name): value for name, value in options.items() if name != "block_table"}
    for row, (begin, end) in enumerate(zip(q_begins[:-1], q_begins[1:])):
        expected = attention(*(array.double().numpy() for array in (q[begin:end], *rows[row])), **wanted)
        if LENS[row][1]:
            close(out[begin:end], expected[0])
            seen = np.isfinite(expected[1]) & (expected[1] > -1e30)
            close(lse[:, begin:end][torch.from_numpy(seen)], expected[1][seen])


def test_sequences_of_one_length():
    q, k, v = normal(2, 3, HEADS, DIM), normal(2, 5, KV_HEADS, DIM), normal(2, 5, KV_HEADS, DIM)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    for row in range(2):
        wanted = attention(*(array[row].double().numpy() for array in (q, k, v)), causal=True)
        close(out[row], wanted[0])
        close(lse[row], wanted[1])


def step(**changes) -> dict:
    return {"q": normal(2, 1, HEADS, DIM), "k_cache": normal(6, 16, KV_HEADS, DIM),
            "v_cache": normal(6, 16, KV_HEADS, DIM), "cache_seqlens": torch.tensor([3, 20], dtype=torch.int32),
            "block_table": torch.zeros(2, 2, dtype=torch.int32)} | changes


@pytest.mark.parametrize("name, error, changes", [
    ("cache_leftpad", NotImplementedError, {"cache_leftpad": torch.zeros(2, dtype=torch.int32)}),
    ("alibi_slopes", NotImplementedError, {"alibi_slopes": torch.zeros(HEADS)}),
    ("q", ValueError, {"q": torch.zeros(2, 1, HEADS, DIM)}),
    ("q", ValueError, {"q": normal(2, HEADS, DIM)}),
    ("k_cache", ValueError, {"k_cache": normal(6, 16, KV_HEADS, 64), "v_cache": normal(6, 16, KV_HEADS, 64)}),
    ("v_cache", ValueError, {"v_cache": normal(5, 16, KV_HEADS, DIM)}),
    ("block_table", ValueError, {"block_table": torch.zeros(2, 2)}),
    ("block_table", ValueError, {"block_table": torch.zeros(3, 2, dtype=torch.int32)}),
    ("cache_batch_idx", ValueError, {"cache_batch_idx": torch.zeros(2, dtype=torch.int32)}),
    ("cache_seqlens", ValueError, {"cache_seqlens": torch.zeros(3, dtype=torch.int32)}),
    ("v", ValueError, {"k": normal(2, 1, KV_HEADS, DIM)}),
    ("k", ValueError, {"k": normal(2, 1, HEADS, DIM), "v": normal(2, 1, KV_HEADS, DIM)}),
    ("cache_seqlens", ValueError, {"k": normal(2, 1, KV_HEADS, DIM), "v": normal(2, 1, KV_HEADS, DIM),
                                   "cache_seqlens": None}),
    ("rotary_sin", ValueError, {"rotary_cos": torch.zeros(9, 8)}),
    ("rotary_cos", ValueError, {"rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8)}),
    ("causal", NotImplementedError, {
        "q": normal(2, 2, HEADS, DIM), "k": normal(2, 2, KV_HEADS, DIM), "v": normal(2, 2, KV_HEADS, DIM),
        "rotary_cos": torch.zeros(64, 8), "rotary_sin": torch.zeros(64, 8)}),
    ("window_size", ValueError, {"window_size": (1.5, 0)}),
    ("dropout_p", NotImplementedError, {"dropout_p": 0.1}),
])
def test_what_is_not_served_is_refused_by_name(name, error, changes):
    with pytest.raises(error, match=f"^{name}: expected"):
        if name == "dropout_p":
            flash_attn_func(normal(1, 1, HEADS, DIM), normal(1, 1, KV_HEADS, DIM), normal(1, 1, KV_HEADS, DIM), 0.1)
        else:
            flash_attn_with_kvcache(**step(**changes))


def test_a_capture_on_another_stream_finds_an_engine(on_cpu):
    """As an engine warms up on one stream and captures on another, which no engine can be built on."""
    engines = EngineCache(TorchEngine, spares=True)
    given = step()
    arrays = (given["q"][:, 0], given["k_cache"].transpose(1, 2), given["v_cache"].transpose(1, 2),
              given["block_table"], given["cache_seqlens"])
    with pytest.raises(RuntimeError, match="before a CUDA graph"):
        engines.run(*arrays, stream=7, capturing=True)
    engines.run(*arrays, stream=0, capturing=False)
    found = [engines.run(*arrays, stream=7, capturing=True)[0] for _ in range(3)]
    assert torch.equal(found[0], found[2])
    with pytest.raises(RuntimeError, match="before a CUDA graph"):
        engines.run(*arrays, stream=8, capturing=True)  # the spare is taken
    engines.run(*arrays, stream=0, capturing=False)
    engines.run(*arrays, stream=8, capturing=True)


def test_stands_in_for_the_package():
    if "flash_attn" in sys.modules or inspect.getmodule(flash_attn_func) is None:
        pytest.skip("another flash_attn was imported")
    try:
        flash_attn.install()
        flash_attn.install()
        from flash_attn import flash_attn_varlen_func as found
        from flash_attn.flash_attn_interface import flash_attn_with_kvcache as other
        assert found is flash_attn_varlen_func and other is flash_attn_with_kvcache
    finally:
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            sys.modules.pop(name, None)


def test_a_foreign_package_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", inspect)
    with pytest.raises(RuntimeError, match="flash_attn: expected no module"):
        flash_attn.install()
