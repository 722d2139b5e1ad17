"""FP8 and INT8 caches: rounding of pkvsim.reference.append, and the kernel's own FP8 compiled for the CPU."""
from __future__ import annotations

import ctypes
import itertools

import ml_dtypes
import numpy as np
import pytest
from cpp import STRICT, build
from hypothesis import given
from hypothesis import strategies as st
from paths import SUPPORT

from pkvsim.reference.append import FP8_DTYPES, quantize_fp8, quantize_int8

HARNESS = SUPPORT / "quantize_harness.cpp"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_is_the_nearest_code(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(FP8_DTYPES[dtype]).astype(np.float64)
    codes = np.sort(codes[np.isfinite(codes)])
    x = np.random.default_rng(0).standard_normal(4000) * np.exp2(np.random.default_rng(1).integers(-20, 20, 4000))
    for precision, scale in itertools.product((np.float64, np.float32), (1.0, 0.125, 3.7)):
        stored = quantize_fp8(x.astype(precision), scale, dtype).astype(np.float64)
        best = np.abs(codes[None, :] - x[:, None] / scale).min(axis=1)
        np.testing.assert_allclose(np.abs(stored - x / scale), best, rtol=1e-5, atol=1e-12)
    assert quantize_fp8(np.array([1e9, -np.inf]), 1.0, dtype).astype(float).tolist() == [codes[-1], codes[0]]


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 15))
def test_int8_is_within_half_a_step(seed: int, exponent: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 2, 16)) * 2.0**exponent
    x[0, 0] = 0.0
    stored, scale = quantize_int8(x)
    assert stored.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (3, 2)
    assert (np.abs(stored).max(axis=-1) == np.where(scale > 0, 127, 0)).all() and scale[0, 0] == 0
    assert (np.abs(stored * scale[..., None].astype(np.float64) - x) <= 0.5001 * scale[..., None]).all()
    narrow, narrow_scale = quantize_int8(x.astype(np.float32))
    assert np.abs(narrow.astype(int) - stored).max() <= 1
    np.testing.assert_allclose(narrow_scale, scale, rtol=1e-6)


@pytest.fixture(scope="session")
def encode(tmp_path_factory):
    """(float32 values, dtype) -> codes, by the header."""
    built = tmp_path_factory.mktemp("quantize") / "quantize_harness.so"
    library = build(HARNESS, built, *STRICT)

    def call(values: np.ndarray, dtype: str) -> np.ndarray:
        values, codes = np.ascontiguousarray(values, np.float32), np.zeros(len(values), np.uint8)
        function = library.encode_e4m3 if dtype == "float8_e4m3fn" else library.encode_e5m2
        function(ctypes.c_void_p(values.ctypes.data), len(values), ctypes.c_void_p(codes.ctypes.data))
        return codes

    return call


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_the_kernels_own_fp8_is_the_references(encode, dtype: str) -> None:
    """Every FP16 and BF16 number, and the neighbours of every tie and code."""
    every = np.arange(2**16, dtype=np.uint16)
    values = np.concatenate([every.view(np.float16).astype(np.float32), every.view(BFLOAT16).astype(np.float32)])
    codes = np.arange(256, dtype=np.uint8).view(FP8_DTYPES[dtype]).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    edges = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2])
    values = np.concatenate(
        [values, edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))]
    )
    numbers = values[~np.isnan(values)]
    np.testing.assert_array_equal(encode(numbers, dtype), quantize_fp8(numbers, 1.0, dtype).view(np.uint8))
    assert np.isnan(encode(np.array([np.nan, -np.nan]), dtype).view(FP8_DTYPES[dtype]).astype(float)).all()
