"""Split, workqueue and balanced against float64, over shapes, edges, poison and random steps."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_ref import attention, check, errors, make_case, run_poisoned
from gpu_needs import flashinfer_kernels, skip_below

from gpu import DecodeEngine
from gpu.routes import flashinfer_decode as fi
from pkvsim import DecodeShape, reference

SCHEDULES = ("split", "workqueue", "balanced")
# One compiled variant a line: dtype, head_dim, group_size, page_size.
VARIANTS = (
    *(("float16", 128, group, 16) for group in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)),
    *(("float16", 128, 4, page) for page in (1, 3, 64, 256)),
    *(("float16", 64, group, 16) for group in (1, 4, 7)),
    *(("float16", 256, group, 16) for group in (1, 4, 8)),
    *(("bfloat16", 128, group, 16) for group in (1, 4, 5)),
    ("bfloat16", 64, 4, 3),
    ("bfloat16", 256, 8, 64),
)
# Tile, page and split edges, empty rows among them.
EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 0, 511, 1000, 2049)


def shape_of(head_dim: int, group: int, page: int, *, kv_heads: int = 2) -> DecodeShape:
    return DecodeShape(num_q_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_every_shape_and_schedule(variant: tuple[str, int, int, int]) -> None:
    dtype, head_dim, group, page = variant
    for seed, seq_lens in enumerate((EDGES, (9000, 3, 700), (5,), (0, 0), (1500,) * 20)):
        case = make_case(shape_of(head_dim, group, page), seq_lens, dtype=dtype, seed=seed)
        wanted = attention(case)
        for schedule in SCHEDULES:
            if group > 16 and schedule != "balanced":
                continue
            engine = DecodeEngine(case.shape, dtype=dtype, schedule=schedule)
            engine.plan(case.seq_lens, case.block_table)
            out, lse = run_poisoned(engine, case)
            check(out, lse, case, dtype=dtype, wanted=wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeats_bit_for_bit(schedule: str) -> None:
    rng = np.random.default_rng(3)
    case = make_case(shape_of(128, 4, 16, kv_heads=8), rng.integers(1, 6000, 24), seed=3)
    engine = DecodeEngine(case.shape, schedule=schedule)
    engine.plan(case.seq_lens, case.block_table)
    first = run_poisoned(engine, case)
    for _ in range(20):
        again = run_poisoned(engine, case)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_steps(schedule: str) -> None:
    """200 steps of one engine, batch and lengths changing: what one step leaves behind cannot hurt the next."""
    rng = np.random.default_rng(20260623)
    shape = shape_of(128, 4, 16, kv_heads=2)
    engine = DecodeEngine(shape, schedule=schedule)
    for step in range(200):
        batch = int(rng.integers(1, 33))
        lens = np.where(rng.random(batch) < 0.1, 0, rng.integers(1, int(rng.choice([40, 400, 3000])), batch))
        case = make_case(shape, lens, seed=step)
        engine.plan(case.seq_lens, case.block_table)
        out, lse = run_poisoned(engine, case)
        check(out, lse, case, dtype="float16")


@pytest.mark.parametrize("group", (1, 4, 7, 8))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_error_within_flashinfers(dtype: str, head_dim: int, group: int) -> None:
    if not fi.installed():
        pytest.skip("FlashInfer is not installed")
    case = make_case(shape_of(head_dim, group, 16, kv_heads=8), (7000, 5000, 1234, 90, 4096, 17), dtype=dtype, seed=1)
    with flashinfer_kernels(f"tensor_core {dtype} {head_dim}"):
        theirs = fi.FlashInferDecode(case.shape, dtype, "tensor_core")
        theirs.plan(case.seq_lens, case.block_table)
        their_out, their_lse = theirs.run(case.q, case.k_pages.nan_to_num(), case.v_pages.nan_to_num())
    wanted = attention(case)
    their_largest, their_mean = errors(their_out, wanted[0])
    for schedule in SCHEDULES:
        engine = DecodeEngine(case.shape, dtype=dtype, schedule=schedule)
        engine.plan(case.seq_lens, case.block_table)
        out, lse = run_poisoned(engine, case)
        largest, mean = check(out, lse, case, dtype=dtype, wanted=wanted)
        assert largest <= 1.5 * their_largest, (schedule, largest, their_largest)
        assert mean <= 1.5 * their_mean, (schedule, mean, their_mean)
        assert float((lse - their_lse).abs().max()) < 2e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pool_beyond_32_bit_offsets(schedule: str) -> None:
    """K alone has more than 2^32 elements; the rows' pages straddle the 2^31 and 2^32 marks and the end."""
    shape = shape_of(128, 4, 16, kv_heads=8)
    page_elements = 8 * 16 * 128
    num_pages = 2**32 // page_elements + 9000
    skip_below(5 * num_pages * page_elements)  # K and V of 16 bits, and room for what the check gathers
    marks = [0, 2**31 // page_elements, 2**32 // page_elements]
    ids = np.unique(np.concatenate([np.arange(mark, mark + 200) for mark in marks]
                                   + [np.arange(num_pages - 400, num_pages)]))
    ids = np.random.default_rng(0).permutation(ids)
    case = make_case(shape, (len(ids) * 16 - 5000, 1000, 3000, 900), ids=ids, num_pages=num_pages)
    assert case.k_pages.numel() > 2**32
    engine = DecodeEngine(shape, schedule=schedule)
    engine.plan(case.seq_lens, case.block_table)
    out, lse = run_poisoned(engine, case)
    check(out, lse, case, dtype="float16")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_combined_cache_is_a_view(schedule: str) -> None:
    case = make_case(shape_of(128, 4, 16), (100, 2000, 0, 5), combined=True)
    engine = DecodeEngine(case.shape, schedule=schedule)
    engine.plan(case.seq_lens, case.block_table)
    out, lse = run_poisoned(engine, case)
    check(out, lse, case, dtype="float16")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numpy_plan_and_cupy_run(schedule: str) -> None:
    cupy = pytest.importorskip("cupy")
    case = make_case(shape_of(128, 4, 16), (100, 2000, 0, 5))
    engine = DecodeEngine(case.shape, schedule=schedule)
    engine.plan(case.seq_lens.cpu().numpy(), case.block_table.cpu().numpy())
    expected, _ = run_poisoned(engine, case)
    torch.cuda.synchronize()
    out, lse = engine.run(*(cupy.from_dlpack(array) for array in (case.q, case.k_pages, case.v_pages)))
    assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
    cupy.cuda.Device().synchronize()
    assert torch.equal(torch.from_dlpack(out), expected)


def test_agrees_with_the_cpu_reference() -> None:
    """The float64 reference used here is the project's own."""
    case = make_case(shape_of(64, 3, 16), (40, 0, 129, 7))
    out, lse = attention(case)
    arrays = [a.double().cpu().numpy() for a in (case.q, case.k_pages, case.v_pages)]
    cpu_out, cpu_lse = reference.attention(case.shape, *arrays, case.block_table.cpu().numpy(),
                                           case.seq_lens.cpu().numpy())
    np.testing.assert_allclose(out.cpu().numpy(), cpu_out, atol=1e-12)
    np.testing.assert_allclose(lse.cpu().numpy(), cpu_lse, atol=1e-12)
