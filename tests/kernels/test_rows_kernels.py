"""cuda_src/rows.cu: norms and gates against float64, the first of the largest; run on the CPU, compiled for GPUs."""
from __future__ import annotations

import ctypes
import shutil
import tempfile
from functools import cache
from pathlib import Path

import cpp
import ml_dtypes
import numpy as np
import nvrtc
import pytest
from decode_on_cpu import aligned
from paths import SUPPORT
from slow import slow_unless, slow_unless_of

from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.launch import Arguments

DTYPES = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}
THREADS, CHOICE_WIDTH = 256, 8192


@cache
def build(bfloat16: int, vectors: int) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="pkv_rows_"))
    try:
        for path in SOURCE_DIR.glob("*.cu*"):
            shutil.copy(path, folder)
        for name in ("mma.cuh", "vectors.cuh"):
            (folder / name).write_text("")
        defines = {"NORM_VECTORS": vectors, "DTYPE_BF16": bfloat16, "WARPS": 8, "FP16_OPERANDS": int(not bfloat16)}
        library = cpp.build(SUPPORT / "rows_harness.cpp", folder / "rows.so", "-std=c++20", "-O1", "-w", f"-I{folder}",
                            f"-I{SUPPORT}", *(f"-D{name}={value}" for name, value in defines.items()))
        for name in ("run_norm", "run_gate", "run_argmax"):
            getattr(library, name).restype = ctypes.c_char_p
        return library
    finally:
        shutil.rmtree(folder)


def run(library, name, kernel, grid, arrays, *numbers):
    arguments = Arguments(fields.signature(kernel, {}))
    arguments.write(*(array.ctypes.data for array in arrays), *numbers)
    complaint = getattr(library, name)(ctypes.c_void_p(arguments.starts[0]), *map(ctypes.c_int, grid))
    assert complaint is None, complaint


@pytest.mark.parametrize(("rows", "width", "bfloat16"), slow_unless_of(
    lambda _, width, __: width <= 2048, [(3, 8, 0), (2, 576, 1), (1, 2048, 0), (2, 4104, 1)]))
def test_norms_are_those_of_float64(rows, width, bfloat16):
    rng, dtype = np.random.default_rng(width), DTYPES[bfloat16]
    x, weight = (aligned((rng.standard_normal(shape) * 2).astype(dtype)) for shape in ((rows, width + 8), (width,)))
    out = aligned(np.zeros((rows, width), dtype))
    vectors = -(-width // (THREADS * 8))
    run(build(bfloat16, vectors), "run_norm", "pkv_rms_norm", (rows, 1), (x, weight, out), width, width + 8, 1e-5)
    wide = x[:, :width].astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight.astype(np.float64)
    step = 2.0**-8 if bfloat16 else 2.0**-11  # one rounding, and a little of the sums'
    assert (np.abs(out.astype(np.float64) - wanted) <= 1.01 * step * np.abs(wanted) + 1e-6).all()


@pytest.mark.parametrize(("rows", "width", "bfloat16"), [(2, 16, 0), (3, 2056, 1), (1, 4096, 0)])
def test_gates_are_those_of_float64(rows, width, bfloat16):
    rng, dtype = np.random.default_rng(width), DTYPES[bfloat16]
    x = aligned((rng.standard_normal((rows, 2 * width)) * 3).astype(dtype))
    out = aligned(np.zeros((rows, width), dtype))
    grid = -(-width // (THREADS * 8)), rows
    run(build(bfloat16, 1), "run_gate", "pkv_silu_gate", grid, (x, out), width, 2 * width)
    gate, up = x[:, :width].astype(np.float64), x[:, width:].astype(np.float64)
    wanted = gate / (1 + np.exp(-gate)) * up
    step = 2.0**-8 if bfloat16 else 2.0**-11
    assert (np.abs(out.astype(np.float64) - wanted) <= 1.01 * step * np.abs(wanted) + 1e-6).all()


@pytest.mark.parametrize(("width", "stride"), [(5, 5), (997, 997), (8192, 8192), (20000, 20000), (17001, 17008)])
@pytest.mark.parametrize("kind", ["ties", "nan", "zeros", "lowest"])
def test_the_first_of_the_largest_is_chosen(width, stride, kind):
    rng, rows = np.random.default_rng(width), 3
    x = aligned(rng.standard_normal((rows, stride)).round(1).astype(np.float16))  # many are equal
    x[:, width:] = np.inf  # of nobody
    if kind == "nan":
        x[1, rng.integers(0, width, 3)] = np.nan
        x[2, width - 1] = -np.nan
    elif kind == "zeros":
        x[:, :width] = np.where(rng.random((rows, width)) < 0.5, np.float16(-0.0), np.float16(0))
    elif kind == "lowest":
        x[:, :width] = -np.inf
        x[1, width // 2] = -65504
    out, states = np.full(rows, -1, np.int64), aligned(np.zeros((rows, 2), np.int64))
    library = build(0, 1)
    for _ in range(2):  # the second finds the states that the first has left
        run(library, "run_argmax", "pkv_argmax", (-(-width // CHOICE_WIDTH), rows), (x, out, states), width, stride)
        np.testing.assert_array_equal(out, x[:, :width].argmax(-1))
        assert not states.any()


@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability == 90, [86, 90]))
def test_they_fit(capability):
    for bfloat16, vectors in ((0, 2), (1, 8)):
        defines = {"DTYPE_BF16": bfloat16, "NORM_VECTORS": vectors}
        used = nvrtc.kernel_resources(SOURCE_DIR / "rows.cu", capability, compile_options(defines))
        assert set(used) == {"pkv_rms_norm", "pkv_silu_gate", "pkv_argmax"}
        assert all(one.registers <= 128 and one.spills == 0 for one in used.values())
