"""cuda_src's decode path itself, built for the CPU, against float64 attention on what 8-bit pages stand for."""
from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from decode_on_cpu import build, make_step, run
from slow import slow_unless, slow_unless_of

from gpu.kernels.variant import kernel_config
from pkvsim import AttentionOptions, DecodeShape, reference
from pkvsim.kv_types import KV_DTYPES, KV_SCALES
from pkvsim.reference.append import dequantize

MAX_ERROR = {"float16": 1e-3, "bfloat16": 8e-3}  # of the largest output
# Type and scales; (head_dim, V's), group, page size; dtype, schedule; further options; e4m3 by the instruction.
CASES = [
    ("float8_e4m3fn", "tensor", (128, 128), 4, 16, "float16", "balanced", {}, True),
    ("float8_e4m3fn", "tensor", (64, 64), 8, 3, "bfloat16", "workqueue", {"window": 50, "query_tokens": 2}, False),
    ("float8_e4m3fn", "token", (192, 128), 1, 64, "bfloat16", "balanced", {"sinks": True, "soft_cap": 4.0}, True),
    ("float8_e5m2", "page", (256, 192), 4, 1, "float16", "workqueue", {}, True),
    ("int8", "token", (64, 64), 4, 16, "float16", "balanced", {"window": 20, "sinks": True}, True),
    ("int8", "page", (128, 128), 12, 16, "bfloat16", "workqueue", {}, True),
]


def expected(step) -> tuple[np.ndarray, np.ndarray]:
    sinks = None if step.sinks is None else step.sinks.astype(np.float64)
    return reference.attention(step.shape, step.q.astype(np.float64), *step.values(), step.table, step.lens,
                               sinks=sinks, options=step.options)


def assert_close(got, want, dtype) -> None:
    largest = max(1.0, np.abs(want[0]).max())
    assert np.abs(got[0] - want[0]).max() <= MAX_ERROR[dtype] * largest  # NaN fails too
    seen = np.isfinite(want[1])
    np.testing.assert_allclose(got[1][seen], want[1][seen], atol=1e-3)
    assert (got[1][~seen] == -np.inf).all() and (got[0][~seen] == 0).all()


def test_cases_cover_every_type_and_kind_of_scales() -> None:
    assert {case[0] for case in CASES} == set(KV_DTYPES) and {case[1] for case in CASES} == set(KV_SCALES)
    assert {case[5:7] for case in CASES} == set(itertools.product(MAX_ERROR, ("balanced", "workqueue")))
    assert {dim for case in CASES for dim in case[2]} == {64, 128, 192, 256}  # every swizzle


@pytest.mark.parametrize("case", slow_unless(lambda case: case in CASES[::2], CASES), ids=lambda case: "-".join(map(str, case[:7])))
def test_the_kernel_attends_to_what_pages_stand_for(case) -> None:
    kv_dtype, kv_scales, (head_dim, v_dim), group, page_size, dtype, schedule, more, converts = case
    shape = DecodeShape(2 * group, 2, head_dim, page_size)
    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales, v_head_dim=v_dim, **more)
    lens = (0, 2, 15, 16, 17, 33, 130) if options.query_tokens > 1 else (0, 1, 15, 16, 17, 33, 200)
    step = make_step(shape, dtype, options, seed=len(dtype) + head_dim, lens=lens)
    for hurry in (False, True):
        assert_close(run(step, schedule, converts_e4m3=converts, hurry=hurry), expected(step), dtype)


@pytest.mark.parametrize(("group", "dtype", "schedule", "ctas", "more"), slow_unless_of(lambda group, dtype, *_: (group, dtype) == (4, "float16"), [
    (1, "float16", "balanced", 1, {}), (3, "bfloat16", "balanced", 13, {"sinks": True}),
    (4, "float16", "balanced", 29, {}), (8, "float16", "balanced", 7, {"window": 90, "soft_cap": 4.0}),
    (4, "bfloat16", "workqueue", 5, {"query_tokens": 2}),
]))
def test_16_bit_pages(group, dtype, schedule, ctas, more) -> None:
    """With 13 and 29 CTAs heads are cut into many parts, which two columns of a warp fetch together."""
    shape, options = DecodeShape(2 * group, 2, 64, 16), AttentionOptions(**more)
    step = make_step(shape, dtype, options, seed=ctas, lens=(390, 0, 2, 33, 100))
    assert_close(run(step, schedule, ctas=ctas), expected(step), dtype)


@pytest.mark.parametrize("ctas", [7, 36, 37, 90])
def test_tasks_of_half_the_grid_go_to_every_other_cta(ctas) -> None:
    """18 tasks: 36 CTAs and more have one of each two without any."""
    shape, options = DecodeShape(8, 2, 64, 16), AttentionOptions()
    step = make_step(shape, "float16", options, seed=ctas, lens=(390, 0, 2, 33, 100))
    assert_close(run(step, "workqueue", ctas=ctas), expected(step), "float16")


@pytest.mark.parametrize("array", ["k", "v", "q"])
def test_what_is_no_number_stays_in_its_row_and_head(array) -> None:
    """Also where parts of heads go from CTA to CTA, whose empty words are a NaN that no arithmetic gives."""
    step = make_step(DecodeShape(8, 2, 64, 16), "float16", AttentionOptions(), seed=3, lens=(390, 0, 2, 33, 100))
    plain = run(step, "balanced", ctas=7)
    if array == "q":
        step.q[0, 5, 7] = np.nan
    else:
        getattr(step, array)[step.table[0, 9], 1, 3, 5] = np.nan
    sick = run(step, "balanced", ctas=7)
    heads = [5] if array == "q" else [4, 5, 6, 7]  # a KV head's group
    dims = [5] if array == "v" else list(range(64))
    for got, wanted, at in zip(sick, plain, (np.ix_([0], heads, dims), np.ix_([0], heads))):
        if array != "v" or got.ndim == 3:  # of weights V has no part
            assert np.isnan(got[at]).all()
            wanted[at] = got[at]
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("lens", [(), (0,), (0, 0)])
def test_steps_without_tokens(lens) -> None:
    step = make_step(DecodeShape(8, 2, 64, 16), "float16", AttentionOptions(), seed=0, lens=(*lens, 0))
    out, lse = run(step, "balanced")
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("more", slow_unless(lambda more: not more, [{}, {"query_tokens": 2}]))
def test_rows_of_negative_length_are_rows_of_none(more) -> None:
    """FlashAttention's callers mark rows that are none by -1 (gpu.drop_ins.flash_attn)."""
    step = make_step(DecodeShape(8, 2, 64, 16), "float16", AttentionOptions(**more), seed=1, lens=(0, 40, 0, 0, 7, 0))
    wanted = expected(step)
    step.lens[step.lens == 0] = -1
    assert_close(run(step, "balanced", ctas=5), wanted, "float16")


def of_case(case) -> tuple[DecodeShape, AttentionOptions]:
    kv_dtype, kv_scales, (head_dim, v_dim), group, page_size, _, _, more, _ = case
    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales, v_head_dim=v_dim, **more)
    return DecodeShape(2 * group, 2, head_dim, page_size), options


@pytest.mark.parametrize("case", slow_unless(lambda case: case in CASES[::2], [CASES[i] for i in (0, 1, 3, 4)]), ids=lambda case: f"{case[0]}-{case[8]}")
def test_every_code_is_widened_exactly(case) -> None:
    shape, options = of_case(case)
    config = kernel_config(shape, case[5], 90, variant=(2, 2), options=options)
    library = build(config, case[6] == "balanced", case[8])
    codes = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (4, 1)), axis=1).T.copy()
    values = dequantize(codes[None, None], case[0], 1.0).reshape(256, 2, 2)
    for alternate in (False, True):
        pairs = np.zeros((256, 2, 2), np.float16)
        library.widen(ctypes.c_void_p(codes.ctypes.data), 256, int(alternate), ctypes.c_void_p(pairs.ctypes.data))
        np.testing.assert_array_equal(pairs, values.swapaxes(1, 2) if alternate else values)  # NaN equals NaN


def case_step(case):
    shape, options = of_case(case)
    return make_step(shape, case[5], options, seed=1, lens=(0, 1, 16, 33, 150))


def every_so_many(step, first: int, each: int):
    """(pages, slots) of every each-th token from `first` on, row by row."""
    for row, length in enumerate(step.lens):
        at = np.arange(length)[first::each]
        yield step.table[row, at // step.shape.page_size], at % step.shape.page_size


@pytest.mark.parametrize("power", (-50, -20, 50))
def test_scales_of_any_magnitude(power) -> None:
    """In BF16, which holds such outputs."""
    step = case_step(CASES[2])
    step.v_scales *= np.float32(2.0**power)
    (out, lse), (want, want_lse) = run(step, "balanced"), expected(step)
    assert_close((out / 2.0**power, lse), (want / 2.0**power, want_lse), "bfloat16")


@pytest.mark.parametrize("power", (-50, -20, 6))
def test_scales_far_apart(power) -> None:
    """The other tokens' weights keep all their bits in the sum, however small their values."""
    step = case_step(CASES[4])
    for pages, slots in every_so_many(step, 0, 2):
        step.v_scales[pages, :, slots] *= np.float32(2.0**power)
        step.k_scales[pages, :, slots] *= 2
    assert_close(run(step, "balanced"), expected(step), "float16")


def test_tokens_without_values_keep_their_weight() -> None:
    """A scale of 0, as CacheWriter stores a head of zeros with."""
    step = case_step(CASES[4])
    for pages, slots in every_so_many(step, 1, 3):
        step.v_scales[pages, :, slots] = 0
        step.k_scales[pages, :, slots] *= 3
    assert_close(run(step, "balanced"), expected(step), "float16")


@pytest.mark.parametrize("which", ("k_scales", "v_scales"))
def test_a_scale_that_is_nan_shows(which) -> None:
    step = case_step(CASES[4])
    row = len(step.lens) - 1
    at = int(step.lens[row]) - 3
    getattr(step, which)[step.table[row, at // 16], 1, at % 16] = np.nan
    out, _ = run(step, "balanced")
    poisoned = np.isnan(out).all(axis=-1)
    assert poisoned[row, 4:].all() and poisoned.sum() == 4
