"""examples/bench_variants.py as far as no GPU is needed: its variants, steps, bytes, options, table and reference."""
from __future__ import annotations

import io

import bench_variants  # noqa: E402
import numpy as np
import pytest
import without_gpu
from bench import variant_cells as variant_cells  # noqa: E402
from bench.variant_cells import (  # noqa: E402
    PLAIN,
    VARIANTS,
    WINDOWED,
    Result,
    cells,
    error_ratios,
    flashinfer_backends,
    jobs,
    table,
    window_cells,
    window_cost,
)
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gpu.routes import flashinfer_decode as flashinfer  # noqa: E402
from pkvsim import AttentionOptions, reference  # noqa: E402
from pkvsim.kv_types import KV_DTYPES  # noqa: E402


def test_help_and_a_machine_without_a_gpu() -> None:
    done = without_gpu.run_main("bench_variants")
    assert "window 4K" in done.stdout and done.stderr.startswith("bench_variants needs a CUDA GPU")


def test_every_variant_meets_every_step_and_the_window_is_compared() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    todo = jobs(VARIANTS, list(cells()))
    assert len(todo) == len(VARIANTS) * 3 + 2 and todo[-2:] == window_cells()
    assert len(jobs((PLAIN,), ["64x2K"])) == 1
    assert {(cell.batch_size, sum(cell.seq_lens)) for cell in cells().values()} >= {(8, 2**18), (64, 2**17)}
    (windowed, long), (plain, short) = window_cells()
    assert windowed.kv_bytes(long.lengths(), 16) == plain.kv_bytes(short.lengths(), 16) == 8 * 4096 * 8 * 128 * 4


@given(st.lists(st.integers(0, 40000), min_size=1, max_size=9), st.sampled_from(VARIANTS))
def test_bytes_are_those_that_must_be_read(lens: list[int], variant) -> None:
    reach = 10**9 if variant.options.window is None else variant.options.window + variant.options.query_tokens - 1
    width = variant.head_dim + (variant.options.v_head_dim or variant.head_dim)
    per_token = {None: 2 * width, "tensor": width, "page": width + 2 * 4 / 16, "token": width + 2 * 4}
    tokens = sum(min(length, reach) for length in lens)
    wanted = tokens * variant.num_kv_heads * per_token[variant.options.kv_scales]
    assert variant.kv_bytes(np.array(lens, np.int32), 16) == wanted


def test_caches_are_measured_by_type_and_scales() -> None:
    kinds = [(v.name, v.options.kv_dtype, v.options.kv_scales) for v in VARIANTS if v.options.kv_dtype]
    assert kinds == [("e4m3 by tensor", "float8_e4m3fn", "tensor"), ("e4m3 by page", "float8_e4m3fn", "page"),
                     ("e5m2 by tensor", "float8_e5m2", "tensor"), ("int8 by token", "int8", "token")]


@pytest.mark.parametrize("words, said", [
    (["--variants", "plain,nothing"], "--variants: expected some of plain"), (["--cells", "9x9"], "--cells: expected"),
    (["--variants", ""], "got none"), (["--repeats", "0"], "--repeats, --pool-gib: expected positive"),
    (["--pool-gib", "nan"], "expected positive"), (["--variant", "8"], "--variant: expected positive WARPSxSTAGES"),
    (["--variant", "8xmany"], "got '8xmany'"), (["--variant", "0x4"], "got '0x4'"),
    (["--variants", "int8 by page"], "int8 by token, got 'int8 by page'")])
def test_bad_options_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_variants.parse_args(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@given(st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=5))
def test_names_with_commas_are_told_apart(chosen: list) -> None:
    names = [variant.name for variant in chosen]
    assert bench_variants.parse_args(["--variants", ",".join(names)]).variants == names


def test_the_kernel_of_8_bit_caches_can_be_chosen() -> None:
    assert bench_variants.parse_args([]).variant is None
    assert bench_variants.parse_args(["--variant", "8x4"]).variant == (8, 4)


def result(variant: str, case: str, route: str, kernel_us: float | None, batch_size: int = 8, note: str = "",
           max_abs_error: float | None = None, rms_error: float | None = None) -> Result:
    return Result(variant, case, batch_size, 8, route, 10**8, 20.0, kernel_us, note=note, max_abs_error=max_abs_error,
                  rms_error=rms_error)


def test_the_table_has_ratios_to_the_limit_and_to_flashinfers_best() -> None:
    results = [result("plain", "4K", "balanced", 25.0), result("plain", "4K", "xqa", 50.0),
               result("plain", "4K", "flashinfer_cuda_core", 40.0), result("sinks", "4K", "balanced", 30.0),
               result("sinks", "4K", "xqa", None, note="differs by 1")]
    made = table(results)
    assert [row[7:12] for row in made.rows[:2]] == [
        ("4000", "20.0", "1.25", "1.000", "1.60"),
        ("2000", "20.0", "2.50", "-", "-"),
    ]
    assert made.rows[3][10:12] == ("1.200", "-") and made.rows[4][6:12] == ("-", "-", "20.0", "-", "-", "-")
    assert "not timed: sinks, xqa: differs by 1" in made.note and window_cost(results) is None
    made.print(Console(file=io.StringIO(), width=150))


@pytest.mark.parametrize("dtype, column", [("float16", "x FP16"), ("bfloat16", "x BF16")])
def test_times_are_held_against_plain_attention_on_the_same_step(dtype: str, column: str) -> None:
    results = [result("int8 by token", "4K", "balanced", 27.0), result("plain", "4K", "balanced", 50.0),
               result("int8 by token", "4K", "balanced", 9.0, batch_size=1), result("plain", "4K", "xqa", 10.0)]
    made = table(results, dtype)
    at = made.columns.index(column)
    assert [row[at] for row in made.rows] == ["0.540", "1.000", "-", "-"]


@pytest.mark.parametrize("our_error, said", [(3e-5, "at most 1.50 x FlashInfer's (e4m3 by tensor, 8 x 4K; within 1.5)"),
                                            (4e-5, "at most 2.00 x FlashInfer's (e4m3 by tensor, 8 x 4K; above 1.5)")])
def test_our_error_is_held_against_the_least_of_flashinfers(our_error: float, said: str) -> None:
    """Of the backends that were timed: one that is wrong excuses nothing."""
    results = [result("plain", "4K", "balanced", 9.0, max_abs_error=1e-5),
               result("plain", "4K", "xqa", 9.0, max_abs_error=1e-5),
               result("e4m3 by tensor", "4K", "balanced", 9.0, max_abs_error=our_error),
               result("e4m3 by tensor", "4K", "xqa", 9.0, max_abs_error=1e-2),
               result("e4m3 by tensor", "4K", "flashinfer_cuda_core", 9.0, max_abs_error=2e-5),
               result("e4m3 by tensor", "4K", "flashinfer_tensor_core", None, max_abs_error=1e-6, note="differs"),
               result("int8 by token", "4K", "balanced", 9.0, max_abs_error=1e-5)]
    assert error_ratios(results) == pytest.approx({("plain", "4K", 8): 1.0,
                                                   ("e4m3 by tensor", "4K", 8): our_error / 2e-5})
    made = table(results)
    assert [row[-2:] for row in made.rows[2:4]] == [(f"{our_error:.1e}", f"{our_error / 2e-5:.2f}"), ("1.0e-02", "-")]
    assert made.rows[-1][-1] == "-" and said in made.note


def test_the_root_mean_square_is_said_as_well() -> None:
    results = [result("plain", "4K", "balanced", 9.0, max_abs_error=1e-5, rms_error=4e-6),
               result("plain", "4K", "xqa", 9.0, max_abs_error=1e-5, rms_error=2e-6)]
    assert error_ratios(results, "rms_error") == pytest.approx({("plain", "4K", 8): 2.0})
    assert "its root mean square: at most 2.00 x FlashInfer's (plain, 8 x 4K; above 1.5)" in table(results).note


def test_flashinfers_backends_are_those_that_have_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "installed", lambda: True)
    both = {"flashinfer_cuda_core", "flashinfer_tensor_core"}
    wanted = {"plain": both | {"xqa"}, "window 4K": both | {"xqa"}, "sinks": {"xqa"}, "soft cap": both,
              "4 query tokens": {"flashinfer_tensor_core"}, "head_dim 192/128": set(), "e4m3 by tensor": both | {"xqa"},
              "e4m3 by page": set(), "e5m2 by tensor": both, "int8 by token": set(), "NHD": set()}
    chosen = {name: bench_variants.BY_NAME[name] for name in wanted}
    assert {name: set(flashinfer_backends(variant, variant.shape(16))) for name, variant in chosen.items()} == wanted


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_pages_of_16_bits_hold_what_codes_stand_for(kv_dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from bench.variant_caches import UNIT, codes_of, factors_of, scales_of, values_of

    codes = codes_of(torch.randn(3, 8, 16, 128, generator=torch.Generator().manual_seed(0)).half(), kv_dtype)
    stored = codes.view(getattr(torch, kv_dtype)).double() * UNIT[kv_dtype]
    for dtype in (torch.float16, torch.bfloat16):
        assert bool((values_of(codes, kv_dtype, dtype).double() == stored).all())
    for kv_scales, size in (("tensor", (1,)), ("page", (3, 8)), ("token", (3, 8, 16))):
        options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
        scales = scales_of(codes, PLAIN.shape(16), options)
        assert {name: (tuple(s.shape), s.unique().tolist()) for name, s in scales.items()} == dict.fromkeys(
            ("k_scale", "v_scale"), (size, [UNIT[kv_dtype]]))
        assert factors_of(options) == {name: float(s.unique()) for name, s in scales.items()}
    assert factors_of(PLAIN.options) == scales_of(codes, PLAIN.shape(16), PLAIN.options) == {}


@pytest.mark.parametrize("window_us, said", [(26.0, "within"), (27.0, "above")])
def test_a_window_over_long_rows_is_held_against_short_rows(window_us: float, said: str) -> None:
    results = [result(WINDOWED.name, "128K", "balanced", window_us), result(PLAIN.name, "4K", "balanced", 25.0)]
    assert window_cost(results) == window_us / 25.0 and said in table(results).note


def test_the_reference_of_a_row_is_pkvsims() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from bench.variant_reference import attention_of_row

    rng = np.random.default_rng(0)
    for variant in (
        *(variant for variant in VARIANTS if variant.options.kv_dtype is None),
        variant_cells.Variant("all", AttentionOptions(window=9, soft_cap=2.0, sinks=True, query_tokens=3)),
    ):
        options, shape = variant.options, variant.shape(4)
        k, v = (
            rng.standard_normal((12, shape.num_kv_heads, 4, width))
            for width in (shape.head_dim, options.value_dim(shape))
        )
        tokens = () if options.query_tokens == 1 else (options.query_tokens,)
        q, ids = rng.standard_normal((1, *tokens, shape.num_q_heads, shape.head_dim)), rng.permutation(12).astype(
            np.int32
        )
        sinks = rng.standard_normal(shape.num_q_heads).astype(np.float32) if options.sinks else None
        wanted, _ = reference.attention(
            shape, q, k, v, ids[None], np.array([42], np.int32), options=options, sinks=sinks
        )
        pages = [torch.from_numpy(pool if variant.layout == "HND" else pool.swapaxes(1, 2).copy()) for pool in (k, v)]
        found = attention_of_row(torch.from_numpy(q[0]), *pages, variant.layout, ids, 42, options,
                                 None if sinks is None else torch.from_numpy(sinks))
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), wanted[0], atol=1e-12)
