"""FlashAttention's functions on the GPU: against float64, captured as engines capture them, and under two engines."""
from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flash_on_cpu import attention
from paths import ROOT

from gpu.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    register_with_transformers,
)
from pkvsim.reference.append import rotate
from pkvsim.reference.rope import HALF, INTERLEAVED, Rope

HEADS, KV_HEADS = 8, 2
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def numpy(array: torch.Tensor) -> np.ndarray:
    return array.double().cpu().numpy()


def cache_of(lens: list[int], page_size: int, room: int, dim: int,
             dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_table), pages in any order, -1 where a row has none; what no row owns is NaN."""
    pages = [-(-(max(0, length) + room) // page_size) for length in lens]
    ids = torch.randperm(sum(pages) + 3, device="cuda").to(torch.int32)
    table = torch.full((len(lens), max(1, *pages)), -1, dtype=torch.int32, device="cuda")
    shape = sum(pages) + 3, page_size, KV_HEADS, dim
    caches = [torch.full(shape, float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    for row, (count, length) in enumerate(zip(pages, lens)):
        table[row, :count], ids = ids[:count], ids[count:]
        for at in range(0, max(0, length), page_size):
            end = min(page_size, length - at)
            for cache in caches:
                cache[table[row, at // page_size].long(), :end] = normal(end, KV_HEADS, dim, dtype=dtype)
    return *caches, table


def row_of(cache: torch.Tensor, table: torch.Tensor, row: int, length: int) -> np.ndarray:
    return numpy(cache[table[row, :-(-length // cache.shape[1])].long()].flatten(0, 1)[:length])


def close(found: torch.Tensor, wanted: np.ndarray, dtype: torch.dtype = torch.float16, *, times: int = 1) -> None:
    tolerance = TOLERANCE[dtype] * times
    torch.testing.assert_close(found.double().cpu(), torch.from_numpy(wanted), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_size, dim", [(16, 64), (256, 128), (24, 128)])
@pytest.mark.parametrize("queries, options", [
    (1, {}), (1, {"window_size": (99, 0), "softmax_scale": 0.2}), (1, {"softcap": 5.0, "causal": True}),
    (1, {"s_aux": True}), (3, {"causal": True}), (20, {"causal": True}), (3, {"window_size": (70, 2)}),
])
def test_every_row_is_its_own_attention(dtype, page_size, dim, queries, options) -> None:
    torch.manual_seed(0)
    lens = [-1, 0, 5, 1000, 256, 17, 3001] if queries == 1 else [0, 5, 1000, 256, 17]
    for new in (0, queries):
        k_cache, v_cache, table = cache_of(lens, page_size, new, dim, dtype)
        q, k, v = (normal(len(lens), count, heads, dim, dtype=dtype) for count, heads in
                   ((queries, HEADS), (new, KV_HEADS), (new, KV_HEADS)))
        given = dict(options)
        if "s_aux" in given:
            given["s_aux"] = torch.linspace(-1, 2, HEADS, device="cuda", dtype=dtype)
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, *((k, v) if new else ()), block_table=table, return_softmax_lse=True,
            cache_seqlens=torch.tensor(lens, dtype=torch.int32, device="cuda"), **given)
        names = {"softmax_scale": "scale", "window_size": "window", "s_aux": "sinks"}
        wanted = {names.get(name, name): numpy(value) if name == "s_aux" else value for name, value in given.items()}
        for row, length in enumerate(lens):
            total = max(0, length + new)
            if new and total:
                assert np.array_equal(row_of(k_cache, table, row, total)[length:], numpy(k[row]))
                assert np.array_equal(row_of(v_cache, table, row, total)[length:], numpy(v[row]))
            if not total and "s_aux" in given:
                continue
            keys, values = (row_of(cache, table, row, total) for cache in (k_cache, v_cache))
            expected = attention(numpy(q[row]), keys, values, **wanted)
            close(out[row], expected[0], dtype)
            close(lse[row], expected[1], dtype)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_rotates_as_it_writes(interleaved, tokens) -> None:
    torch.manual_seed(0)
    lens, dim = [9, 0, 300, 33], 128
    k_cache, v_cache, table = cache_of(lens, 256, tokens, dim, torch.float16)
    q, k, v = (normal(len(lens), tokens, heads, dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    angles = torch.outer(torch.arange(512.0), 1e4 ** -torch.arange(32.0).div(32)).cuda()
    cos, sin, old, given = angles.cos().half(), angles.sin().half(), k_cache.clone(), (q.clone(), k.clone())
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin,
                                  torch.tensor(lens, dtype=torch.int32, device="cuda"), block_table=table, causal=True,
                                  rotary_interleaved=interleaved)
    assert torch.equal(q, given[0]) and torch.equal(k, given[1])
    rope = Rope(style=INTERLEAVED if interleaved else HALF, cos_sin=torch.cat([cos, sin], 1).float().cpu().numpy())
    for row, length in enumerate(lens):
        at = np.arange(length, length + tokens)
        turned = rotate(numpy(k[row]), at, rope)
        assert np.allclose(row_of(k_cache, table, row, length + tokens)[length:], turned, atol=4e-3)
        keys = np.concatenate([row_of(old, table, row, length), turned])
        close(out[row], attention(rotate(numpy(q[row]), at, rope), keys,
                                  row_of(v_cache, table, row, length + tokens), causal=True)[0])


def test_caches_without_a_table() -> None:
    torch.manual_seed(0)
    k_cache, v_cache = normal(5, 640, KV_HEADS, 64), normal(5, 640, KV_HEADS, 64)
    q, k, v = normal(3, 1, HEADS, 64), normal(3, 1, KV_HEADS, 64), normal(3, 1, KV_HEADS, 64)
    which = torch.tensor([4, 0, 2], dtype=torch.int32, device="cuda")
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=600, cache_batch_idx=which)
    for row, entry in enumerate([4, 0, 2]):
        assert torch.equal(k_cache[entry, 600], k[row, 0])
        close(out[row], attention(numpy(q[row]), numpy(k_cache[entry, :601]), numpy(v_cache[entry, :601]))[0])


LENS = [(5, 5), (1, 300), (70, 90), (0, 4), (64, 20), (600, 600)]  # queries, keys


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"causal": True, "window_size": (30, 5)}, {"causal": True, "softcap": 3.0}])
def test_packed_sequences(options, paged) -> None:
    torch.manual_seed(0)
    q_begins, k_begins = (torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32) for counts in zip(*LENS))
    q = normal(int(q_begins[-1]), HEADS, 64)
    if paged:
        k, v, table = cache_of([keys for _, keys in LENS], 256, 0, 64, torch.float16)
        rows = [[row_of(cache, table, row, keys) for cache in (k, v)] for row, (_, keys) in enumerate(LENS)]
        options = options | {"block_table": table}
    else:
        k, v = normal(int(k_begins[-1]), KV_HEADS, 64), normal(int(k_begins[-1]), KV_HEADS, 64)
        rows = [[numpy(new[begin:end]) for new in (k, v)] for begin, end in zip(k_begins[:-1], k_begins[1:])]
    out, lse, _ = flash_attn_varlen_func(q, k, v, q_begins.cuda(), k_begins.cuda(), 600, 600, return_attn_probs=True,
                                         **options)
    wanted = {{"window_size": "window"}.get(name, name): value for name, value in options.items()
              if name != "block_table"}
    times = 3 if "softcap" in options else 1  # whose logits are rounded to float16
    for row, (begin, end) in enumerate(zip(q_begins[:-1], q_begins[1:])):
        expected = attention(numpy(q[begin:end]), *rows[row], **wanted)
        close(out[begin:end], expected[0], times=times)
        seen = torch.from_numpy(np.isfinite(expected[1])).cuda()
        close(lse[:, begin:end][seen], expected[1][seen.cpu().numpy()], times=times)


def test_sequences_of_one_length() -> None:
    q, k, v = normal(2, 30, HEADS, 64), normal(2, 50, KV_HEADS, 64), normal(2, 50, KV_HEADS, 64)
    out = flash_attn_func(q, k, v, causal=True)
    for row in range(2):
        close(out[row], attention(numpy(q[row]), numpy(k[row]), numpy(v[row]), causal=True)[0])


def test_graphs_of_several_sizes_captured_beside_the_stream_that_warmed_up() -> None:
    """As nano-vllm does it: a call on the default stream, the capture on torch's own, one pool for all sizes; rows that
    are none, tables with stale entries."""
    torch.manual_seed(0)
    layers, most, pages, dim = 3, 8, 40, 128
    caches = normal(2, layers, pages, 256, KV_HEADS, dim)
    q, new = normal(layers, most, 1, HEADS, dim), normal(2, layers, most, 1, KV_HEADS, dim)
    lens = torch.zeros(most, dtype=torch.int32, device="cuda")
    table = torch.zeros(most, 4, dtype=torch.int32, device="cuda")
    out = torch.zeros(2, layers, most, HEADS, dim, dtype=torch.float16, device="cuda")

    def step(rows: int) -> None:
        for layer in range(layers):
            given = q[layer, :rows], caches[0, layer], caches[1, layer]
            tables = {"cache_seqlens": lens[:rows], "block_table": table[:rows], "causal": True}
            out[0, layer, :rows] = flash_attn_with_kvcache(*given, **tables)[:, 0]
            out[1, layer, :rows] = flash_attn_with_kvcache(*given, *new[:, layer, :rows], **tables)[:, 0]

    graphs, pool = {}, None
    for rows in (8, 4, 1):
        step(rows)
        graphs[rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[rows], pool):
            step(rows)
        pool = pool or graphs[rows].pool()
    rng = np.random.default_rng(0)
    for rows, live in ((8, 8), (4, 3), (1, 1), (8, 5)):
        lens.fill_(-1)  # rows that are none: their tables are stale, and nothing may be written there
        lens[:live] = torch.from_numpy(rng.integers(1, 1000, live).astype(np.int32))
        ids = torch.from_numpy(rng.permutation(pages)[:live * 4].astype(np.int32)).cuda().view(live, 4)
        past = torch.arange(4, device="cuda") * 256 > lens[:live, None]
        table[:live] = torch.where(past, -1, ids)
        q.normal_(), new.normal_(), out.fill_(9)
        graphs[rows].replay()
        for layer in range(layers):
            for row in range(live):
                length = int(lens[row])
                keys, values = (row_of(caches[side, layer], table, row, length + 1) for side in (0, 1))
                assert np.array_equal(keys[-1], numpy(new[0, layer, row, 0]))
                close(out[0, layer, row], attention(numpy(q[layer, row]), keys[:-1], values[:-1])[0][0])
                close(out[1, layer, row], attention(numpy(q[layer, row]), keys, values)[0][0])
            assert not out[:, layer, live:rows].any()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family, dtype", [("llama", "float16"), ("qwen3", "bfloat16"), ("mistral", "float16")])
def test_continuous_batching_gives_the_same_tokens(family, dtype, graphs, monkeypatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from bench.generate_ways import Batch, compare, reference_logits
    from generate import NEAR_TIE
    from tiny_models import make_model, prompts
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from gpu.drop_ins.flash_attn import with_kvcache

    register_with_transformers()
    options = {"sliding_window": 50} if family == "mistral" else {}
    model = make_model(family, head_dim=64, dtype=getattr(torch, dtype), device="cuda", **options)
    lens, new_tokens = [211, 2, 90, 1, 64, 17], 40
    inputs = prompts(lens, "left", device="cuda")
    batch = Batch(inputs["input_ids"], inputs["attention_mask"], new_tokens)
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[:, max(lens):].cpu()
    model.set_attn_implementation("pkv_flash_2")
    if family == "mistral":
        # Transformers 5.17 asks an attention module for its window, which Mistral's does not keep, and so ignores windows
        # with any FlashAttention; 5.24 passes the model's.
        for layer in model.model.layers:
            layer.self_attn.sliding_window = model.config.sliding_window
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pool = ContinuousBatchingConfig(num_blocks=24, max_batch_tokens=512, use_cuda_graph=graphs)
    decode, decoded = with_kvcache.decode, []
    monkeypatch.setattr(with_kvcache, "decode", lambda *step, **how: decoded.append(step) or decode(*step, **how))
    found = model.generate_batch(batch.prompts(), generation_config=config, continuous_batching_config=pool)
    in_order = sorted(found.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
    tokens = torch.tensor([output.generated_tokens for _, output in in_order])
    agreement = compare(tokens, expected, partial(reference_logits, model, batch, expected), NEAR_TIE[dtype])
    assert not agreement.wrong
    assert decoded or family == "mistral"  # whose window keeps Transformers from its block tables


@pytest.mark.parametrize("eager", [True, False])
def test_nano_vllm_serves_on_our_kernels(eager) -> None:
    source = os.environ.get("NANO_VLLM")
    if source is None:
        pytest.skip("NANO_VLLM names no checkout of nano-vllm")
    words = [sys.executable, str(ROOT / "tests/support/run_nano_vllm.py"), "--source", str(Path(source).resolve()),
             "--rows", "12", *(["--eager"] if eager else [])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
