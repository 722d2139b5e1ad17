"""8-bit caches against float64 attention on what their pages stand for: types, scales, schedules, options, graphs."""
from __future__ import annotations

import itertools
import math
from dataclasses import replace

import cupy
import numpy as np
import pytest
import torch
from decode_ref import MAX_ERROR, Case, attention, check, make_table
from quantised_ref import Quantised, dequantised, make_quantised

from gpu import BatchDecodeWithPagedKVCacheWrapper, CacheWriter, DecodeEngine, PagedKVCache
from gpu.measure.timing import capture, shared_stream
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.kv_types import KV_DTYPES, KV_SCALES

SCHEDULES = ("balanced", "workqueue", "split")
EDGES = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 257, 0, 1000, 2049)
# Every type, kind of scales, dtype and head_dim; group sizes and page sizes take turns.
VARIANTS = [(*kind, (1, 4, 8)[index % 3], (1, 16, 64)[(index // 3 + index) % 3])
            for index, kind in enumerate(itertools.product(KV_DTYPES, KV_SCALES, ("float16", "bfloat16"),
                                                           (64, 128, 256)))]
ODD = [("float8_e4m3fn", "token", "bfloat16", 192, 8, 16), ("int8", "page", "float16", 192, 4, 3),
       ("float8_e5m2", "tensor", "bfloat16", 128, 12, 16), ("int8", "token", "bfloat16", 128, 32, 16),
       ("float8_e4m3fn", "tensor", "bfloat16", 256, 16, 16), ("float8_e4m3fn", "page", "float16", 64, 7, 256)]
KINDS = (("float8_e4m3fn", "tensor"), ("int8", "token"), ("float8_e5m2", "page"))
OPTIONS = (AttentionOptions(window=1), AttentionOptions(window=100), AttentionOptions(soft_cap=2.0),
           AttentionOptions(sinks=True), AttentionOptions(window=333, soft_cap=5.0, sinks=True),
           AttentionOptions(query_tokens=2), AttentionOptions(query_tokens=8),
           AttentionOptions(query_tokens=5, window=20, sinks=True), AttentionOptions(v_head_dim=64))


def shape_of(head_dim: int = 128, group: int = 4, page: int = 16, *, kv_heads: int = 2) -> DecodeShape:
    return DecodeShape(num_q_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page)


def run(engine: DecodeEngine, step: Quantised, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Plans and runs into outputs full of NaN, which stale memory cannot imitate."""
    engine.plan(step.seq_lens, step.block_table)
    out = torch.full((*step.q.shape[:-1], step.v.shape[-1]), float("nan"), dtype=step.q.dtype, device="cuda")
    lse = torch.full(step.q.shape[:-1], float("nan"), dtype=torch.float32, device="cuda")
    given = {"k_scale": step.k_scale, "v_scale": step.v_scale} | more
    engine.run(step.q, step.k, step.v, out=out, lse=lse, **given)
    torch.cuda.synchronize()
    return out, lse


@pytest.mark.parametrize("variant", VARIANTS + ODD, ids=lambda v: "-".join(map(str, v)))
def test_every_type_scale_and_schedule(variant: tuple) -> None:
    kv_dtype, kv_scales, dtype, head_dim, group, page = variant
    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
    for seed, lens in enumerate((EDGES, (9000, 3, 700), (0, 0), (1500,) * 20)):
        step = make_quantised(shape_of(head_dim, group, page), lens, options, dtype=dtype, seed=seed)
        case = step.case()
        wanted = attention(case)
        for schedule in SCHEDULES:
            out, lse = run(DecodeEngine(step.shape, dtype, schedule, options=options), step)
            check(out, lse, case, dtype=dtype, wanted=wanted)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_options(options: AttentionOptions, kind: tuple[str, str]) -> None:
    options, dtype = options.with_cache(*kind), "bfloat16" if kind[0] == "float8_e4m3fn" else "float16"
    step = make_quantised(shape_of(), (0, 8, 9, 16, 17, 40, 130, 257, 1000, 3001), options, dtype=dtype)
    sinks = torch.randn(8, device="cuda") if options.sinks else None
    want, want_lse = step.expected(**({"sinks": sinks.double().cpu().numpy()} if options.sinks else {}))
    for schedule in SCHEDULES:
        engine = DecodeEngine(step.shape, dtype, schedule, options=options)
        out, lse = (array.double().cpu().numpy() for array in run(engine, step, sinks=sinks))
        assert np.abs(out - want).max() <= MAX_ERROR[dtype]  # NaN fails too
        seen = np.isfinite(want_lse)
        assert (lse[~seen] == -np.inf).all() and np.abs(lse - want_lse)[seen].max() <= 2e-3


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_nhd_pages_and_views(kind: tuple[str, str]) -> None:
    """Scales have the pages' axes."""
    step = make_quantised(shape_of(), EDGES, AttentionOptions(kv_dtype=kind[0], kv_scales=kind[1]))
    k, v = (pool.view(torch.uint8).transpose(1, 2).contiguous().view(pool.dtype) for pool in (step.k, step.v))
    wide = torch.full((*v.shape[:3], 160), 0x7F, dtype=torch.uint8, device="cuda")
    wide[..., 16:144] = v.view(torch.uint8)
    scales = [s.transpose(1, 2).contiguous() if kind[1] == "token" else s for s in (step.k_scale, step.v_scale)]
    nhd = replace(step, k=k, v=wide.view(v.dtype)[..., 16:144], k_scale=scales[0], v_scale=scales[1])
    out, lse = run(DecodeEngine(step.shape, layout="NHD", options=step.options), nhd)
    check(out, lse, step.case(), dtype="float16")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_repeats_bit_for_bit(kv_dtype: str) -> None:
    rng = np.random.default_rng(3)
    step = make_quantised(shape_of(kv_heads=8), rng.integers(1, 6000, 24), AttentionOptions(kv_dtype=kv_dtype))
    engine = DecodeEngine(step.shape, kv_dtype=kv_dtype)
    first = run(engine, step)
    for _ in range(20):
        assert all(map(torch.equal, first, run(engine, step)))


@pytest.mark.parametrize("layout", ("HND", "NHD"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_a_writer_stores_is_what_decode_reads(kv_dtype: str, dtype: str, layout: str) -> None:
    shape, lens = shape_of(kv_heads=4), np.array([1, 16, 17, 0, 900, 33], np.int32)
    table = torch.from_numpy(make_table(lens, 16, np.random.default_rng(0).permutation(80).astype(np.int32))).cuda()
    middle = (4, 16) if layout == "HND" else (16, 4)
    k, v = (torch.full((80, *middle, 128), 0x7F, dtype=torch.uint8, device="cuda") for _ in "kv")
    k, v = (k.view(torch.int8), v.view(torch.int8)) if kv_dtype == "int8" else (k, v)
    tokens = int(lens.sum())
    k_new, v_new = ((torch.randn(tokens, 4, 128, device="cuda") * size).to(getattr(torch, dtype)) for size in (1, 0.4))
    seq_lens = torch.from_numpy(lens).cuda()
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lens))).astype(np.int32)).cuda()
    if kv_dtype == "int8":
        scales = [torch.full((80, *middle), float("nan"), device="cuda") for _ in "kv"]
        written = dict(zip(("k_token_scales", "v_token_scales"), scales))
    else:
        scales = [torch.tensor([value], device="cuda") for value in (0.02, 0.01)]
        written = dict(zip(("k_scale", "v_scale"), scales))
    CacheWriter(shape, dtype, kv_dtype=kv_dtype, layout=layout).append(
        k_new, v_new, k, v, seq_lens=seq_lens, block_table=table, token_offsets=offsets, **written)
    options = AttentionOptions(kv_dtype=kv_dtype)
    q = torch.randn(len(lens), 16, 128, device="cuda").to(k_new.dtype)
    step = Quantised(shape, options, q, k, v, *scales, table, seq_lens)
    out, lse = run(DecodeEngine(shape, dtype, kv_dtype=kv_dtype, layout=layout), step)
    typed = (pool if kv_dtype == "int8" else pool.view(getattr(torch, kv_dtype)) for pool in (k, v))
    values = [dequantised(*pair) for pair in zip(typed, scales)]
    values = values if layout == "HND" else [pool.transpose(1, 2) for pool in values]
    check(out, lse, Case(shape, q, *values, table, seq_lens), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_captured_step_follows_pages_and_scales(kind: tuple[str, str]) -> None:
    options = AttentionOptions(kv_dtype=kind[0], kv_scales=kind[1])
    lens = [np.random.default_rng(seed).permutation(EDGES) for seed in range(4)]
    steps = [make_quantised(shape_of(), some, options, seed=seed) for seed, some in enumerate(lens)]
    names = ("q", "k", "v", "k_scale", "v_scale", "block_table", "seq_lens")
    fixed = replace(steps[0], **{name: getattr(steps[0], name).clone() for name in names})
    engine = DecodeEngine(fixed.shape, options=options)
    out, lse = torch.empty_like(fixed.q), torch.empty(fixed.q.shape[:2], device="cuda")

    def decode() -> None:
        engine.plan(fixed.seq_lens, fixed.block_table)
        engine.run(fixed.q, fixed.k, fixed.v, out=out, lse=lse, k_scale=fixed.k_scale, v_scale=fixed.v_scale)

    with shared_stream():
        decode()
        graph = capture(decode)
        for step in steps[1:] + steps[:1]:
            for name in names:
                getattr(fixed, name).copy_(getattr(step, name))
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            graph.replay()
            check(out, lse, step.case(), dtype="float16")


@pytest.mark.parametrize("kind", [("float8_e4m3fn", "token"), ("int8", "token"), ("int8", "page")], ids="-".join)
@pytest.mark.parametrize("power", (-50, -20, 50))
def test_scales_of_any_magnitude(power: int, kind: tuple[str, str]) -> None:
    """Outputs in BF16, which holds them; a token without values keeps its weight."""
    step = make_quantised(shape_of(), EDGES, AttentionOptions(kv_dtype=kind[0], kv_scales=kind[1]), dtype="bfloat16")
    step.v_scale.mul_(2.0**power)
    step.v_scale[::7] = 0
    out, lse = run(DecodeEngine(step.shape, "bfloat16", options=step.options), step)
    scaled = replace(step, v_scale=step.v_scale * 2.0**-power)
    check((out.double() * 2.0**-power).bfloat16(), lse, scaled.case(), dtype="bfloat16")


@pytest.mark.parametrize("kv_dtype", ("float8_e4m3fn", "float8_e5m2"))
def test_a_nan_in_a_page_shows(kv_dtype: str) -> None:
    for pool, dtype in itertools.product(("k", "v"), ("float16", "bfloat16")):
        step = make_quantised(shape_of(), (700, 900), AttentionOptions(kv_dtype=kv_dtype), dtype=dtype)
        page = int(step.block_table[1, 20])
        getattr(step, pool).view(torch.uint8)[page, 1, 5, 77] = 0xFF if kv_dtype == "float8_e4m3fn" else 0x7D
        out, _ = run(DecodeEngine(step.shape, dtype, kv_dtype=kv_dtype), step)
        poisoned = out.isnan()
        assert bool(poisoned[1, 4:].all() if pool == "k" else poisoned[1, 4:, 77].all())
        assert int(poisoned.sum()) == (4 * 128 if pool == "k" else 4)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_pool_of_cupy_arrays_filled_by_a_writer(kv_dtype: str) -> None:
    shape, rng = shape_of(64, 4, 16), np.random.default_rng(1)
    cache = PagedKVCache(shape, num_pages=60, max_batch=3, max_seq_len=300, dtype=kv_dtype)
    writer, engine = CacheWriter(shape, kv_dtype=kv_dtype), DecodeEngine(shape, kv_dtype=kv_dtype)
    rows = [cache.allocate() for _ in range(3)]
    for counts in ((40, 3, 200), (1, 1, 1), (1, 1, 1)):
        cache.reserve(rows, counts)
        lens, table = cache.device_tables()
        new = [cupy.asarray(rng.standard_normal((sum(counts), 2, 64)).astype(np.float16)) * 0.5 for _ in "kv"]
        offsets = cupy.asarray(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
        names = ("k_token_scales", "v_token_scales") if kv_dtype == "int8" else ("k_scale", "v_scale")
        writer.append(*new, cache.k_pages, cache.v_pages, seq_lens=lens, block_table=table, token_offsets=offsets,
                      **dict(zip(names, (cache.k_scales, cache.v_scales))))
        q = cupy.asarray(rng.standard_normal((3, 8, 64)).astype(np.float16))
        engine.plan(lens, table)
        out, lse = engine.run(q, cache.k_pages, cache.v_pages, k_scale=cache.k_scales, v_scale=cache.v_scales)
        as_torch = [torch.as_tensor(array, device="cuda") for array in (q, table, lens, out, lse)]
        pages = [torch.as_tensor(pool, device="cuda") for pool in (cache.k_pages, cache.v_pages)]
        pages = pages if kv_dtype == "int8" else [pool.view(getattr(torch, kv_dtype)) for pool in pages]
        scales = [torch.as_tensor(some, device="cuda") for some in (cache.k_scales, cache.v_scales)]
        values = map(dequantised, pages, scales)
        check(as_torch[3], as_torch[4], Case(shape, as_torch[0], *values, *as_torch[1:3]), dtype="float16")


@pytest.mark.parametrize("kv_dtype", ("float8_e4m3fn", "float8_e5m2"))
def test_the_flashinfer_wrapper_takes_fp8_pages(kv_dtype: str) -> None:
    step = make_quantised(shape_of(), EDGES, AttentionOptions(kv_dtype=kv_dtype), dtype="bfloat16")
    pages = -(-step.seq_lens // 16)
    indptr = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).int()
    indices = torch.cat([row[:count] for row, count in zip(step.block_table, pages.tolist())])
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8, device="cuda"), "HND")
    wrapper.plan(indptr, indices, (step.seq_lens - 1) % 16 + (step.seq_lens > 0), 8, 2, 128, 16, q_data_type="bfloat16",
                 kv_data_type=getattr(torch, kv_dtype))
    for v_scale in (float(step.v_scale), step.v_scale):
        out, lse = wrapper.run(step.q, (step.k, step.v), k_scale=float(step.k_scale), v_scale=v_scale, return_lse=True)
        check(out, lse * math.log(2), step.case(), dtype="bfloat16")


@pytest.mark.parametrize("kind,bad,named", [
    ("tensor", {"k_scale": 0.0}, "k_scale"), ("tensor", {"v_scale": torch.ones(2)}, "v_scale"),
    ("page", {"k_scale": None}, "k_scale"), ("token", {"v_scale": 1.0}, "v_scale"),
    ("token", {"k_scale": torch.ones(1)}, "k_scale"), (None, {"k_scale": 1.0}, "k_scale")])
def test_wrong_scales_are_named_and_leave_the_engine_usable(kind: str | None, bad: dict, named: str) -> None:
    options = AttentionOptions(kv_dtype="int8", kv_scales=kind or "tensor")
    step = make_quantised(shape_of(), (5, 90), options)
    bad = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in bad.items()}
    engine = DecodeEngine(step.shape, options=options if kind else AttentionOptions())
    if kind is None:
        step = replace(step, k=step.k.half(), v=step.v.half(), k_scale=None, v_scale=None)
    run(engine, step)
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        run(engine, step, **bad)
    run(engine, step)
