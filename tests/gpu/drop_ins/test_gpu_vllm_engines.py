"""The vLLM adapter's engines on the GPU, without vLLM: on caches laid out as its own, captured, every cache type."""
from __future__ import annotations

import cupy
import numpy as np
import pytest
import torch
from torch_paged import paged_attention

from gpu.drop_ins.vllm.engines import KV_TYPES, SCALE_BYTES, Engines, LayerKind, append, own_planes
from gpu.drop_ins.vllm.step import DecodeRows
from gpu.engine.prefixes import PrefixGroups, default_rule
from pkvsim import DecodeShape
from pkvsim.reference.append import quantize_fp8, quantize_int8
from pkvsim.schedule.prefixes import find_prefixes

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
NUM_BLOCKS, MAX_ROWS, MAX_BLOCKS = 600, 8, 64
DEVICE = torch.device("cuda", 0)
SHARING_ROWS = (96, 64)  # of two captured steps
PREFIX_BLOCKS, SHARING_BLOCKS = 104, 640  # full blocks that a group's rows share; of the pool
TABLE_BLOCKS = PREFIX_BLOCKS + 64  # room of a row: with less, 64 rows of 8 bits could not save enough, and none look
NOBODYS, EMPTY = -1, -2  # in place of a row's group


def make_cache(kind: str, *, hnd: bool, num_blocks: int = NUM_BLOCKS) -> tuple[torch.Tensor, object, object]:
    """(cache [num_blocks, 2, block_size, num_kv_heads, head_size] as values, k_scale, v_scale), random."""
    kv_dtype, scales = KV_TYPES[kind]
    sizes = (num_blocks, 2, SHAPE.page_size, SHAPE.num_kv_heads, SHAPE.head_dim)
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


def sharing_step(rng: np.random.Generator, group_of_row: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(seq_lens, block table): rows of a group begin with its full blocks, and each has 1 to 60 tokens of its own."""
    ids = iter((rng.permutation(SHARING_BLOCKS - 1) + 1).tolist())  # 0 is vLLM's null block
    prefixes = {group: [next(ids) for _ in range(PREFIX_BLOCKS)] for group in {*group_of_row} if group >= 0}
    lens = np.zeros(len(group_of_row), np.int32)
    table = np.zeros((len(group_of_row), TABLE_BLOCKS), np.int32)
    for row, group in enumerate(group_of_row):
        if group == EMPTY:
            continue
        prefix, own = prefixes.get(group, []), int(rng.integers(1, 61))
        blocks = [*prefix, *(next(ids) for _ in range(-(-own // SHAPE.page_size)))]
        lens[row], table[row, :len(blocks)] = len(prefix) * SHAPE.page_size + own, blocks
    return lens, table


@pytest.mark.parametrize("name, hnd", [("auto", False), ("auto", True), ("fp8", False), ("int8_per_token_head", False)])
def test_captured_steps_whose_rows_come_to_share_blocks_and_stop(name: str, hnd: bool) -> None:
    """Two graphs of one engine, as vLLM has one for each number of rows: they store, find groups and run two layers.

    The keys that they store are what the first query head of each KV head looks for, so that stale ones would be seen.
    """
    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    cache, k_scale, v_scale = make_cache(name, hnd=hnd, num_blocks=SHARING_BLOCKS)
    k_pages, v_pages = cache.unbind(1)
    kind = LayerKind(SHAPE, "bfloat16", None, None, False, *KV_TYPES[name], SHAPE.head_dim**-0.5)
    engines, most = Engines(DEVICE, shared_prefixes=True), max(SHARING_ROWS)
    decoder, writer = engines.decoder(kind, {1}, most, None), engines.writer(kind)
    slot = decoder.slots[1]
    assert slot.most_sharing == most
    rule = default_rule(SHAPE, kind.options(1))
    lens = torch.zeros(most, dtype=torch.int32, device=DEVICE)
    table = torch.zeros(most, TABLE_BLOCKS, dtype=torch.int32, device=DEVICE)
    q = torch.randn(most, SHAPE.num_q_heads, SHAPE.head_dim, device=DEVICE).bfloat16()
    key, value = (torch.randn(most, SHAPE.num_kv_heads, SHAPE.head_dim, device=DEVICE).bfloat16() for _ in range(2))
    outs = [torch.empty_like(q) for _ in range(2)]

    def step(num_rows: int) -> None:
        rows = DecodeRows(lens[:num_rows], table[:num_rows], num_rows, 1)
        append(writer, rows, key, value, k_pages, v_pages, k_scale, v_scale)
        for out in outs:  # two layers
            decoder.run(rows, q[:num_rows], k_pages, v_pages, out[:num_rows], k_scale, v_scale)

    graphs: dict[int, tuple[torch.cuda.CUDAGraph, PrefixGroups]] = {}
    for num_rows in SHARING_ROWS:
        step(num_rows)  # as vLLM does before each capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(num_rows)
        graphs[num_rows] = graph, slot.engine.schedule_engine._plan.groups.finder.groups
    nobody, half = [NOBODYS] * most, most // 2
    shared = 0
    for group_of_row in (nobody, [0] * most, [0, 1] * half, [0] * 60 + [NOBODYS] * 36, [0] * 90 + [EMPTY] * 6,
                         [1] * half + [0] * half, [EMPTY] * most, nobody):
        host_lens, host_table = sharing_step(rng, group_of_row)
        lens.copy_(torch.from_numpy(host_lens))
        table.copy_(torch.from_numpy(host_table))
        q.normal_()
        key.copy_(q[:, ::SHAPE.group_size] * 4)
        value.normal_()
        for num_rows, (graph, groups) in graphs.items():
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            wanted_groups = find_prefixes(host_table[:num_rows], host_lens[:num_rows], page_size=SHAPE.page_size,
                                          rule=rule)
            prefix_pages = cupy.asnumpy(groups.prefix_pages)
            count = len(wanted_groups.prefix_pages)
            assert (cupy.asnumpy(groups.group_of_row) == wanted_groups.group_of_row).all()
            assert (prefix_pages[:count] == wanted_groups.prefix_pages).all() and not prefix_pages[count:].any()
            shared += count > 0
            pools = (values(pages, name, scale) for pages, scale in ((k_pages, k_scale), (v_pages, v_scale)))
            wanted, _ = paged_attention(q[:num_rows], *pools, table[:num_rows], lens[:num_rows])
            for out in outs:
                torch.testing.assert_close(out[:num_rows], wanted, atol=2e-2, rtol=2e-2)
                assert out[num_rows:].isnan().all()
    assert shared >= 4  # of all 96 rows at least, whatever the type of the cache
