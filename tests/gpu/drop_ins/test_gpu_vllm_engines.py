"""The vLLM adapter's engines on the GPU, without vLLM: on caches laid out as its own, captured, every cache type."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_paged import paged_attention

from gpu.drop_ins.vllm.engines import KV_TYPES, SCALE_BYTES, Engines, LayerKind, append, own_planes
from gpu.drop_ins.vllm.step import DecodeRows
from pkvsim import DecodeShape
from pkvsim.reference.append import quantize_fp8, quantize_int8

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
NUM_BLOCKS, MAX_ROWS, MAX_BLOCKS = 600, 8, 64
DEVICE = torch.device("cuda", 0)


def make_cache(kind: str, *, hnd: bool) -> tuple[torch.Tensor, object, object]:
    """(cache [num_blocks, 2, block_size, num_kv_heads, head_size] as values, k_scale, v_scale), random."""
    kv_dtype, scales = KV_TYPES[kind]
    sizes = (NUM_BLOCKS, 2, SHAPE.page_size, SHAPE.num_kv_heads, SHAPE.head_dim)
    if hnd:
        sizes = (sizes[0], 2, sizes[3], sizes[2], sizes[4])
    if kv_dtype is None:
        cache = torch.randn(sizes, device=DEVICE).bfloat16()
        return cache.transpose(2, 3) if hnd else cache, None, None
    longer = SCALE_BYTES if scales == "token" else 0
    bytes_like = torch.zeros(*sizes[:-1], sizes[-1] + longer, device=DEVICE, dtype=torch.uint8)
    cache = bytes_like.view(torch.int8) if kv_dtype == "int8" else bytes_like
    cache = cache.transpose(2, 3) if hnd else cache
    k_scale = v_scale = torch.tensor(0.05, device=DEVICE)
    if scales == "token":
        cache, k_scale, v_scale = own_planes(cache, SHAPE.head_dim)
        for plane in (k_scale, v_scale):
            plane.copy_(torch.rand(plane.shape, device=DEVICE) * 0.02 + 0.005)
    drawn = torch.randn(cache.shape, device=DEVICE)
    stored = (drawn * 40).round().clamp(-127, 127).to(torch.int8) if kv_dtype == "int8" else (
        (drawn * 8).to(torch.float8_e4m3fn).view(torch.uint8))
    cache.copy_(stored)
    return cache, k_scale, v_scale


def values(pages: torch.Tensor, kind: str, scale: object) -> torch.Tensor:
    """HND float64 values of NHD pages."""
    kv_dtype, _ = KV_TYPES[kind]
    if kv_dtype == "float8_e4m3fn":
        pages = pages.contiguous().view(torch.float8_e4m3fn)
    wide = pages.double()
    if scale is not None:
        wide = wide * (scale if scale.dim() == 0 else scale[..., None])
    return wide.transpose(1, 2)


@pytest.mark.parametrize("hnd", [False, True])
@pytest.mark.parametrize("kind", ["auto", "fp8", "fp8_per_token_head", "int8_per_token_head"])
@pytest.mark.parametrize("query_tokens, window, sinks", [(1, None, False), (4, 33, True)])
def test_a_captured_graph_follows_lengths_and_tables(kind: str, hnd: bool, query_tokens: int, window: int | None,
                                                     sinks: bool) -> None:
    torch.manual_seed(0)
    cache, k_scale, v_scale = make_cache(kind, hnd=hnd)
    kv_dtype, kv_scales = KV_TYPES[kind]
    layers = LayerKind(SHAPE, "bfloat16", window, None, sinks, kv_dtype, kv_scales, SHAPE.head_dim**-0.5)
    own_sinks = torch.randn(SHAPE.num_q_heads, device=DEVICE).bfloat16() if sinks else None
    decoder = Engines(DEVICE).decoder(layers, {1, query_tokens}, MAX_ROWS, own_sinks)
    lens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=DEVICE)
    table = torch.zeros(MAX_ROWS, MAX_BLOCKS, dtype=torch.int32, device=DEVICE)
    q = torch.randn(MAX_ROWS * query_tokens, 48, SHAPE.head_dim, device=DEVICE).bfloat16()[:, :SHAPE.num_q_heads]
    out = torch.empty(q.shape, dtype=q.dtype, device=DEVICE)
    rows = DecodeRows(lens, table, MAX_ROWS, query_tokens)
    k_pages, v_pages = cache.unbind(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.run(rows, q, k_pages, v_pages, out, k_scale, v_scale)
    for given in ([5, 700, 1000, 17, 64, 4, 0, 0], [1000] * 3 + [0] * 5, [16] * 8):
        lens.copy_(torch.tensor(given, dtype=torch.int32))
        table.copy_(torch.randperm(NUM_BLOCKS - 1, device=DEVICE)[:MAX_ROWS * MAX_BLOCKS].view(table.shape) + 1)
        graph.replay()
        grouped = q if query_tokens == 1 else q.unflatten(0, (MAX_ROWS, query_tokens))
        pools = values(k_pages, kind, k_scale), values(v_pages, kind, v_scale)
        wanted, _ = paged_attention(grouped, *pools, table, lens, window=window, sinks=decoder.sinks)
        torch.testing.assert_close(out.view(wanted.shape), wanted, atol=2e-2, rtol=2e-2)


def stored(new: torch.Tensor, kind: str, scale: object) -> tuple[torch.Tensor, object]:
    """(what pages hold of a token's keys or values [num_kv_heads, head_size], the scales that are stored with it)."""
    if kind == "auto":
        return new, None
    exact = new.float().cpu().numpy()
    if kind == "fp8":
        return torch.from_numpy(quantize_fp8(exact, float(scale), "float8_e4m3fn").view(np.uint8)), None
    codes, scales = quantize_int8(exact)
    return torch.from_numpy(codes), torch.from_numpy(scales.astype(np.float32))


@pytest.mark.parametrize("hnd", [False, True])
@pytest.mark.parametrize("name", ["auto", "fp8", "int8_per_token_head"])
def test_a_captured_step_stores_before_it_attends(name: str, hnd: bool) -> None:
    torch.manual_seed(1)
    cache, k_scale, v_scale = make_cache(name, hnd=hnd)
    engines = Engines(DEVICE)
    kind = LayerKind(SHAPE, "bfloat16", None, None, False, *KV_TYPES[name], SHAPE.head_dim**-0.5)
    decoder, writer = engines.decoder(kind, {1}, MAX_ROWS, None), engines.writer(kind)
    assert engines.writer(kind) is writer
    lens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=DEVICE)
    table = torch.zeros(MAX_ROWS, MAX_BLOCKS, dtype=torch.int32, device=DEVICE)
    q, out = (torch.randn(MAX_ROWS, SHAPE.num_q_heads, SHAPE.head_dim, device=DEVICE).bfloat16() for _ in range(2))
    qkv = torch.randn(MAX_ROWS + 3, 48, SHAPE.head_dim, device=DEVICE).bfloat16()  # vLLM's are padded, and slices
    key, value = qkv[:, 32:40], qkv[:, 40:]
    rows = DecodeRows(lens, table, MAX_ROWS, 1)
    k_pages, v_pages = cache.unbind(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(writer, rows, key, value, k_pages, v_pages, k_scale, v_scale)
        decoder.run(rows, q, k_pages, v_pages, out, k_scale, v_scale)
    for given in ([5, 700, 1000, 17, 64, 1, 0, 0], [1000] * 3 + [0] * 5, [16] * 8):
        lens.copy_(torch.tensor(given, dtype=torch.int32))
        table.copy_(torch.randperm(NUM_BLOCKS - 1, device=DEVICE)[:MAX_ROWS * MAX_BLOCKS].view(table.shape) + 1)
        qkv.normal_()
        wanted_cache, wanted_scales = cache.clone(), [None if scale is None else scale.clone()
                                                      for scale in (k_scale, v_scale)]
        for row, length in enumerate(given):
            if length:
                block, place = table[row, (length - 1) // SHAPE.page_size], (length - 1) % SHAPE.page_size
                for side, new in enumerate((key, value)):
                    codes, scales = stored(new[row], name, wanted_scales[side])
                    wanted_cache[block, side, place] = codes.to(DEVICE)
                    if scales is not None:
                        wanted_scales[side][block, place] = scales.to(DEVICE)
        graph.replay()
        assert torch.equal(cache, wanted_cache)
        if name != "auto":
            assert torch.equal(k_scale, wanted_scales[0]) and torch.equal(v_scale, wanted_scales[1])
        pools = (values(pages, name, scale) for pages, scale in zip(wanted_cache.unbind(1), wanted_scales))
        wanted, _ = paged_attention(q, *pools, table, lens)
        torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
