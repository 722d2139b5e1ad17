"""CacheWriter against pkvsim.reference.append, bit for bit."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from append_ref import (
    KV_DTYPES,
    ROPES,
    SHAPES,
    assert_same_bits,
    expected,
    inv_freq,
    make_step,
    raw,
    rope_of,
    to_numpy,
)
from gpu_needs import skip_below

from gpu import CacheWriter
from pkvsim import DecodeShape
from pkvsim.reference.rope import ROPE_STYLES, Rope, make_cos_sin


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("style", ROPES)
@pytest.mark.parametrize("dims", SHAPES, ids=lambda dims: "-".join(map(str, dims)))
def test_every_variant_bit_for_bit(dims: tuple[int, ...], style: str | None, kv_dtype: str | None) -> None:
    for seed, (dtype, layout, ragged, combined) in enumerate(
        (
            ("float16", "HND", False, False),
            ("bfloat16", "NHD", True, False),
            ("float16", "NHD", True, dims[0] == dims[1]),
        )
    ):
        step = make_step(
            dims, dtype=dtype, kv_dtype=kv_dtype, layout=layout, ragged=ragged, combined=combined, seed=seed
        )
        want = expected(step, rope_of(style, dims[2], on_gpu=False), layout)
        writer = CacheWriter(
            step.shape,
            dtype,
            kv_dtype=kv_dtype,
            layout=layout,
            head_dim_v=dims[1],
            rope=rope_of(style, dims[2], on_gpu=True),
        )
        q = step.q if style else None  # without a rope queries have no business here
        given = writer.append(
            step.k_new, step.v_new, step.k_pages, step.v_pages, q=q, validate=False, **step.where(), **step.options
        )
        assert given is q
        assert_same_bits(step, step.q, want)


@pytest.mark.parametrize("style", ROPE_STYLES)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_frequencies_at_far_positions(style: str, dtype: str) -> None:
    """Against float64: off by no more than the rounding of the output and FP32's of the angle's sine."""
    dims = (32, 32, 32, 8, 1, 256)
    lens = (131072, 1, 1 << 20, 77)
    step = make_step(dims, dtype=dtype, lens=lens, seed=3)
    rope = Rope(style=style, inv_freq=inv_freq(32), factor=0.9)
    want_k, want_v, want_q, _, _ = expected(step, rope, "HND", np.float64)
    q_out = torch.full_like(step.q, float("nan"), memory_format=torch.contiguous_format)
    before = step.q.clone()
    writer = CacheWriter(step.shape, dtype, rope=rope)
    assert (
        writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, q_out=q_out, **step.where())
        is q_out
    )
    torch.cuda.synchronize()
    assert torch.equal(step.q, before) and (raw(to_numpy(step.v_pages)) == raw(want_v)).all()
    unit = 2.0**-10 if dtype == "float16" else 2.0**-7
    for found, want in ((step.k_pages, want_k), (q_out, want_q)):
        found, want = to_numpy(found).astype(np.float64), want.astype(np.float64)
        assert (np.abs(found - want) <= unit * np.abs(want) + 5e-6).all()


def test_table_and_frequencies_agree() -> None:
    dims, pools = SHAPES[0], []
    for rope in (
        rope_of("half", 128, on_gpu=True),
        Rope(style="half", inv_freq=torch.from_numpy(inv_freq(128)).cuda(), factor=1.1),
    ):
        step = make_step(dims, ragged=True, seed=9)
        CacheWriter(step.shape, rope=rope).append(step.k_new, step.v_new, step.k_pages, step.v_pages, **step.where())
        pools.append(step.k_pages.float())
    torch.testing.assert_close(pools[0], pools[1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ("float8_e4m3fn", "float8_e5m2"))
def test_scales_on_the_gpu_and_bytes_for_pages(kv_dtype: str) -> None:
    step = make_step(SHAPES[0], kv_dtype=kv_dtype, ragged=True)
    want = expected(step, None, "HND")
    scales = {name: torch.full((1,), value, device="cuda") for name, value in step.options.items()}
    pages = [pool.view(torch.uint8) for pool in (step.k_pages, step.v_pages)]
    CacheWriter(step.shape, kv_dtype=kv_dtype).append(step.k_new, step.v_new, *pages, **step.where(), **scales)
    assert_same_bits(step, step.q, want)


@pytest.mark.parametrize("kv_dtype", ("float8_e4m3fn", "float8_e5m2", "int8"))
def test_largest_numbers_saturate(kv_dtype: str) -> None:
    step = make_step(SHAPES[0], kv_dtype=kv_dtype)
    step.k_new[:, :, ::3] = 65504.0
    step.k_new[:, 1, 1::3] = -65504.0
    step.v_new[:, 0] = 0.0
    want = expected(step, None, "HND")
    CacheWriter(step.shape, kv_dtype=kv_dtype).append(
        step.k_new, step.v_new, step.k_pages, step.v_pages, **step.where(), **step.options
    )
    assert_same_bits(step, step.q, want)


def test_a_combined_cache_and_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    step = make_step(SHAPES[0], combined=True, ragged=True)
    want = expected(step, None, "HND")
    torch.cuda.synchronize()
    both = torch.as_strided(
        step.k_pages,
        (step.k_pages.shape[0], 2, *step.k_pages.shape[1:]),
        (step.k_pages.stride(0), step.k_pages.stride(0) // 2, *step.k_pages.stride()[1:]),
    )
    k_new, v_new, pages = (cupy.from_dlpack(array) for array in (step.k_new, step.v_new, both))
    CacheWriter(step.shape).append(
        k_new, v_new, pages, **{name: cupy.from_dlpack(array) for name, array in step.where().items()}
    )
    cupy.cuda.Device().synchronize()
    assert_same_bits(step, step.q, want)


def test_what_is_not_there_is_passed_over() -> None:
    """Wrong page ids, rows shorter than their tokens, lengths past the table: neither pages nor queries change."""
    step = make_step(SHAPES[0], ragged=True)
    rope = rope_of("half", 128, on_gpu=False)
    lens, table = step.seq_lens.cpu().numpy(), step.block_table.cpu().numpy()
    table[1, 0], table[4, 53] = -1, step.k_pages.shape[0]
    lens[5], lens[6] = 20, 10**9  # 33 tokens in a row of 20
    step = replace(step, seq_lens=torch.from_numpy(lens).cuda(), block_table=torch.from_numpy(table).cuda())
    want = expected(step, rope, "HND")
    writer = CacheWriter(step.shape, rope=rope_of("half", 128, on_gpu=True))
    writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, **step.where())
    assert_same_bits(step, step.q, want)
    with pytest.raises(ValueError, match="^seq_lens"):
        writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, validate=True, **step.where())


def test_random_ragged_steps() -> None:
    """One writer, batch, tokens and layouts of tensors changing from call to call; many rows, so that the search for a
    token's row takes several rounds."""
    rng = np.random.default_rng(20260623)
    writers = {
        kv: CacheWriter(make_step(SHAPES[1]).shape, kv_dtype=kv, rope=rope_of("interleaved", 32, on_gpu=True))
        for kv in KV_DTYPES
    }
    for seed in range(60):
        batch = int(rng.choice([1, 2, 31, 32, 33, 1000, 1100]))
        counts = rng.integers(0, 4, batch)
        lens = np.where(rng.random(batch) < 0.2, 0, counts + rng.integers(0, 30, batch))
        kv_dtype = KV_DTYPES[seed % 4]
        step = make_step(SHAPES[1], kv_dtype=kv_dtype, ragged=True, lens=tuple(lens), counts=tuple(counts), seed=seed)
        want = expected(step, rope_of("interleaved", 32, on_gpu=False), "HND")
        writers[kv_dtype].append(
            step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, **step.where(), **step.options
        )
        assert_same_bits(step, step.q, want)


def test_many_tokens() -> None:
    """Enough that a warp takes all heads of its token."""
    step = make_step(SHAPES[0], ragged=True, lens=(6000, 5, 3000), counts=(5000, 5, 2999))
    want = expected(step, Rope(style="half", cos_sin=make_cos_sin(inv_freq(128), 8192)), "HND")
    writer = CacheWriter(
        step.shape, rope=Rope(style="half", cos_sin=torch.from_numpy(make_cos_sin(inv_freq(128), 8192)).cuda())
    )
    writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, validate=True, **step.where())
    assert_same_bits(step, step.q, want)


def test_pool_beyond_32_bit_offsets() -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=8, head_dim=128, page_size=16)
    page = 8 * 16 * 128
    num_pages = 2**32 // page + 100
    skip_below(5 * num_pages * page)  # K and V of 16 bits, and what the check counts
    pool = torch.zeros((num_pages, 8, 16, 128), dtype=torch.float16, device="cuda")
    ids = torch.tensor(
        [0, 2**31 // page - 1, 2**31 // page, 2**32 // page - 1, 2**32 // page, num_pages - 1],
        dtype=torch.int32,
        device="cuda",
    )
    k_new, v_new = torch.rand((2, 6, 8, 128), device="cuda").half() + 1
    lens = torch.tensor([1, 16, 5, 16, 1, 16], dtype=torch.int32, device="cuda")
    CacheWriter(shape).append(k_new, v_new, pool, torch.zeros_like(pool), seq_lens=lens, block_table=ids[:, None])
    torch.cuda.synchronize()
    assert torch.equal(pool[ids.long(), :, lens.long() - 1], k_new)
    assert sum(int(torch.count_nonzero(part)) for part in pool.split(4096)) == k_new.numel()
