"""cuda_src/product.cu: products with their norm, sum or gate against float64, run on the CPU; compiled for GPUs."""
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
from hypothesis import given
from hypothesis import strategies as st
from paths import SUPPORT
from product_ref import EPS, expected
from slow import slow_unless_of

torch = pytest.importorskip("torch")

from gpu.kernels import fields  # noqa: E402
from gpu.kernels.compile import SOURCE_DIR, compile_options  # noqa: E402
from gpu.kernels.launch import Arguments  # noqa: E402
from gpu.kernels.variant import SHARED_LIMIT_BYTES, shared_limit_bytes  # noqa: E402
from gpu.serve.model.product_variant import ADD, GATE, STORE, ProductVariant, variant  # noqa: E402


@cache
def build(compiled_for: ProductVariant) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="pkv_product_"))
    try:
        for path in SOURCE_DIR.glob("*.cu*"):
            shutil.copy(path, folder)
        (folder / "mma.cuh").write_text("")
        defines = compiled_for.defines() | {"WARPS": 8, "FP16_OPERANDS": int(not compiled_for.bfloat16)}
        library = cpp.build(SUPPORT / "product_harness.cpp", folder / "product.so", "-std=c++20", "-O1", "-w",
                            f"-I{folder}", f"-I{SUPPORT}", *(f"-D{name}={value}" for name, value in defines.items()))
        library.run.restype = ctypes.c_char_p
        return library
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("hurry", [0, 1])
@pytest.mark.parametrize(("depth", "rows", "columns", "normed", "end", "bias", "bfloat16", "stages", "ctas"), slow_unless_of(lambda depth, *_: depth == 512, [
    (128, 64, 1, True, STORE, False, False, 2, 2),
    (576, 96, 3, True, STORE, True, False, 4, 2),
    (512, 128, 8, True, GATE, False, True, 3, 3),
    (1024, 64, 2, False, ADD, True, False, 4, 1),
    (64, 64, 5, False, ADD, False, True, 2, 2),  # fewer chunks than warps
    (2304, 64, 4, True, GATE, True, False, 2, 1),  # several vectors a thread
]))
def test_products_are_those_of_float64(hurry, depth, rows, columns, normed, end, bias, bfloat16, stages, ctas):
    rng, dtype = np.random.default_rng(depth + rows), np.dtype(ml_dtypes.bfloat16 if bfloat16 else np.float16)
    room = 1 << (columns - 1).bit_length()
    library = build(ProductVariant(depth, room, normed, end, bfloat16, stages))

    def drawn(*shape, scale=1.0):
        return aligned((rng.standard_normal(shape) * scale).astype(dtype))

    ctypes.c_int.in_dll(library, "copies_hurry").value = hurry  # copies arrive late, or at once
    x_stride, out_stride = depth + 8, (rows // 2 if end == GATE else rows) + 4
    x, weight = drawn(columns, x_stride, scale=3.0 if normed else 1.0), drawn(rows, depth, scale=depth**-0.5)
    norm, biases = drawn(depth), drawn(rows) if bias else None
    out = drawn(columns, out_stride)
    wide = [array.astype(np.float64) for array in (x, weight, norm, out)]
    width = out_stride - 4
    wanted = expected(wide[0][:, :depth], wide[1], None if biases is None else biases.astype(np.float64),
                      wide[3][:, :width], end, norm=wide[2] if normed else None)
    around = out[:, width:].copy()
    arguments = Arguments(fields.signature("pkv_product", {}))
    pointers = [array.ctypes.data if array is not None else 0 for array in (x, weight, norm, biases, out)]
    arguments.write(*pointers, columns, rows, x_stride, out_stride, EPS)
    complaint = library.run(ctypes.c_int(ctas), ctypes.c_void_p(arguments.starts[0]))
    assert complaint is None, complaint
    error = np.abs(out[:, :width].astype(np.float64) - wanted) / (1 + np.abs(wanted))
    assert error.max() < (2e-2 if bfloat16 else 3e-3)
    np.testing.assert_array_equal(out[:, width:], around)


@pytest.mark.parametrize(("capability", "depth", "columns"), slow_unless_of(lambda *case: case == (90, 4096, 8), [
    (90, 4096, 1), (90, 4096, 8), (90, 14336, 4), (86, 2048, 1), (86, 576, 8), (86, 4096, 1),
]))
def test_it_fits(capability, depth, columns):
    for normed, end in ((True, STORE), (True, GATE), (False, ADD)):
        found = variant(rows=4096, depth=depth, columns=columns, normed=normed, end=end, bfloat16=False,
                        shared_limit=shared_limit_bytes(capability))
        assert found is not None
        used = nvrtc.kernel_resources(SOURCE_DIR / "product.cu", capability, compile_options(found.defines()))
        assert set(used) == {"pkv_product"}
        assert used["pkv_product"].registers <= 255 and used["pkv_product"].spills == 0


@given(capability=st.sampled_from([*SHARED_LIMIT_BYTES, 110]), rows=st.integers(1, 200_000), chunks=st.integers(1, 300),
       columns=st.integers(1, 16), normed=st.booleans(), end=st.sampled_from([STORE, ADD, GATE]), bfloat16=st.booleans())
def test_no_variant_is_chosen_that_a_gpu_cannot_run(capability, rows, chunks, columns, normed, end, bfloat16):
    limit = shared_limit_bytes(capability)
    found = variant(rows=rows, depth=64 * chunks, columns=columns, normed=normed, end=end, bfloat16=bfloat16,
                    shared_limit=limit)
    assert found is None or found.shared_bytes() <= limit and found.columns >= columns


def test_what_it_does_not_serve():
    limit = shared_limit_bytes(90)
    usual = {"rows": 4096, "depth": 4096, "columns": 8, "normed": True, "end": STORE, "bfloat16": False}
    assert variant(**usual, shared_limit=limit).stages == 4
    for changed in ({"columns": 9}, {"rows": 4080}, {"depth": 4100}, {"depth": 14336}):
        assert variant(**{**usual, **changed}, shared_limit=limit) is None
