"""cuda_src/wide_product.cu: products with their sum or gate against float64, run on the CPU; compiled for GPUs."""
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
from product_ref import expected
from slow import slow_unless_of

from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.launch import Arguments
from gpu.kernels.variant import SHARED_LIMIT_BYTES, shared_limit_bytes
from gpu.serve.model.product_variant import ADD, CTA_BYTES, GATE, STORE, WideVariant, variant, wide_variant


@cache
def build(compiled_for: WideVariant) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="pkv_wide_"))
    try:
        for path in SOURCE_DIR.glob("*.cu*"):
            shutil.copy(path, folder)
        for name in ("mma.cuh", "wgmma.cuh", "ahead.cuh"):
            (folder / name).write_text("")
        defines = compiled_for.defines() | {"WARPS": compiled_for.threads() // 32, "FP16_OPERANDS": int(not compiled_for.bfloat16)}
        library = cpp.build(SUPPORT / "wide_product_harness.cpp", folder / "wide.so", "-std=c++20", "-O1", "-w",
                            f"-I{folder}", f"-I{SUPPORT}", *(f"-D{name}={value}" for name, value in defines.items()))
        library.run.restype = ctypes.c_char_p
        return library
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("hurry", [0, 1])
@pytest.mark.parametrize(("variant", "rows", "columns", "bias", "ctas"), slow_unless_of(lambda variant, *_: variant.depth == 576, [
    (WideVariant(64, 8, STORE, False, 128, 3, 0), 96, 1, True, 1),
    (WideVariant(256, 16, ADD, True, 128, 4, 0, 2), 288, 13, False, 4),
    (WideVariant(576, 32, GATE, False, 128, 3, 0, 4, 1), 192, 31, True, 5),  # ranges end amid both of their tiles
    (WideVariant(128, 64, STORE, True, 128, 4, 0), 384, 33, False, 3),  # ranges are whole tiles
    (WideVariant(448, 32, ADD, False, 128, 3, 1), 160, 32, True, 6),  # tiles are cut into three and more
    (WideVariant(448, 32, ADD, False, 128, 3, 2), 160, 30, True, 6),
    (WideVariant(192, 128, GATE, False, 256, 3, 1, 8, 2), 320, 100, True, 2),
]))
def test_products_are_those_of_float64(hurry, variant, rows, columns, bias, ctas):
    depth, end = variant.depth, variant.end
    rng, dtype = np.random.default_rng(depth + rows), np.dtype(ml_dtypes.bfloat16 if variant.bfloat16 else np.float16)
    library = build(variant)

    def drawn(*shape, scale=1.0):
        return aligned((rng.standard_normal(shape) * scale).astype(dtype))

    ctypes.c_int.in_dll(library, "copies_hurry").value = hurry  # copies arrive late, or at once
    x_stride, out_stride = depth + 8, (rows // 2 if end == GATE else rows) + 4
    x, weight = drawn(columns, x_stride), drawn(rows, depth, scale=depth**-0.5)
    biases, first = drawn(rows) if bias else None, drawn(columns, out_stride)
    parts = aligned(np.full((ctas, variant.part_bytes() // 4), 0xFFFFFFFF, np.uint32))
    width = out_stride - 4
    wide = [array.astype(np.float64) for array in (x, weight, first)]
    wanted = expected(wide[0][:, :depth], wide[1], None if biases is None else biases.astype(np.float64),
                      wide[2][:, :width], end)
    outs = []
    for _ in range(2):  # the second finds the workspace that the first has left
        out = aligned(first.copy())
        arguments = Arguments(fields.signature("pkv_wide_product", {}))
        pointers = [array.ctypes.data if array is not None else 0 for array in (x, weight, biases, out, parts)]
        arguments.write(*pointers, columns, rows, x_stride, out_stride)
        complaint = library.run(ctypes.c_int(ctas), ctypes.c_void_p(arguments.starts[0]),
                                ctypes.c_void_p(x.ctypes.data), ctypes.c_int(x.nbytes // 4))
        assert complaint is None, complaint
        assert (parts == 0xFFFFFFFF).all()
        started = ctypes.c_int.in_dll(library, "next_kernel_started")
        assert started.value == variant.threads() * ctas  # every thread lets it once
        started.value = 0
        outs.append(out)
    np.testing.assert_array_equal(*(out.view(np.uint16) for out in outs))
    # One rounding of the output, and FP32 sums.
    step = 2.0**-8 if variant.bfloat16 else 2.0**-11
    error = np.abs(outs[0][:, :width].astype(np.float64) - wanted)
    assert (error <= 1.01 * step * np.abs(wanted) + 1e-4).all()
    np.testing.assert_array_equal(outs[0][:, width:], first[:, width:])


@pytest.mark.parametrize(("capability", "columns", "end"), slow_unless_of(lambda *case: case in ((90, 64, ADD), (90, 128, GATE)), [
    (90, 8, STORE), (90, 32, GATE), (90, 64, ADD), (90, 128, GATE), (86, 16, ADD), (86, 64, GATE),
]))  # fmt: skip
def test_it_fits(capability, columns, end):
    limit = shared_limit_bytes(capability)
    found = wide_variant(rows=4096, depth=14336 if end == ADD else 4096, columns=columns, end=end, bfloat16=end == GATE,
                         capability=capability, shared_limit=limit)
    used = nvrtc.kernel_resources(SOURCE_DIR / "wide_product.cu", capability, compile_options(found.defines()))
    assert set(used) == {"pkv_wide_product"}
    assert used["pkv_wide_product"].registers <= (128 if columns <= 64 else 255)  # so that two CTAs fit
    assert used["pkv_wide_product"].spills == 0 and found.shared_bytes() <= limit


@given(rows=st.integers(1, 200_000), chunks=st.integers(1, 300), columns=st.integers(1, 128), num_sms=st.integers(1, 200))
def test_every_cta_has_units(rows, chunks, columns, num_sms):
    found = wide_variant(rows=rows, depth=64 * chunks, columns=columns, end=STORE, bfloat16=False, capability=90,
                         shared_limit=shared_limit_bytes(90))
    grid, units = found.grid(rows, num_sms), -(-rows // found.tile_rows) * chunks
    assert 1 <= grid <= num_sms and grid <= units and units * grid < 2**32
    assert found.columns >= columns and (found.columns > 64 or found.shared_bytes() <= CTA_BYTES)


@given(capability=st.sampled_from([*SHARED_LIMIT_BYTES, 110]), rows=st.integers(1, 200_000), chunks=st.integers(1, 300),
       columns=st.integers(1, 200), end=st.sampled_from([STORE, ADD, GATE]), bfloat16=st.booleans(), normed=st.booleans())
def test_no_variant_is_chosen_that_a_gpu_cannot_run(capability, rows, chunks, columns, end, bfloat16, normed):
    limit = shared_limit_bytes(capability)
    given = {"rows": rows, "depth": 64 * chunks, "columns": columns, "end": end, "bfloat16": bfloat16, "shared_limit": limit}
    wide, narrow = wide_variant(capability=capability, **given), variant(normed=normed, **given)
    assert wide is None or wide.unfit(capability, limit) is None
    assert narrow is None or narrow.shared_bytes() <= limit


@pytest.mark.parametrize(("made", "said"), [
    (WideVariant(4096, 32, STORE, False, 128, 5, 0), "takes 102400 bytes of shared memory, and a CTA has at most 101376"),
    (WideVariant(4096, 32, STORE, False, 128, 3, 1), "compute capability 8.6 has no products of warpgroups"),
    (WideVariant(4096, 8, STORE, False, 128, 1, 0), "has room for 1 stages"),
    (WideVariant(4096, 128, STORE, False, 256, 2, 0), "a part of 131072 bytes does not fit its ring of 98304"),
    (WideVariant(4096, 32, STORE, False, 128, 3, 0, per_sm=2), "an SM has no room for 2 CTAs of 61440 bytes"),
])  # fmt: skip
def test_why_a_gpu_does_not_run_a_variant(made, said):
    assert said in made.unfit(86, shared_limit_bytes(86))


def test_what_it_does_not_serve():
    usual = {"rows": 4096, "depth": 4096, "columns": 64, "end": GATE, "bfloat16": False, "capability": 86,
             "shared_limit": shared_limit_bytes(86)}
    assert wide_variant(**usual).stages == 4
    for changed in ({"columns": 0}, {"columns": 65}, {"columns": 129, "capability": 90}, {"rows": 4095}, {"depth": 96}):
        assert wide_variant(**{**usual, **changed}) is None
