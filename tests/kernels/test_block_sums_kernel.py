"""cuda_src/block_sums.cu adds up what pkvsim.memory.blocks.block_sums does; compiled for GPUs, and run on the CPU."""
import ctypes

import numpy as np
import nvrtc
import pytest
from cpp import STRICT, build
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT

from gpu.cache.tiers.cuda_sums import DEFINES
from gpu.kernels.compile import SOURCE_DIR, compile_options
from pkvsim.memory.blocks.block_sums import SUMS, block_sums

FEW = 32  # threads of a CTA that runs here


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    options = [option for option in STRICT if option != "-Werror"]
    folder = tmp_path_factory.mktemp("block_sums")
    return build(SUPPORT / "block_sums_harness.cpp", folder / "block_sums.so", *options, "-w", f"-DTHREADS={FEW}",
                 "-DUNROLL=4", f"-I{SUPPORT}").run  # fmt: skip


@settings(max_examples=80)
@given(ctas=st.integers(1, 9), blocks=st.integers(1, 6), runs=st.integers(1, 6), vectors=st.integers(1, 70),
       gap=st.integers(0, 3), seed=st.integers(0, 99))  # fmt: skip
def test_sums_are_those_of_the_definition(kernel, ctas, blocks, runs, vectors, gap, seed):
    rng = np.random.default_rng(seed)
    pages = rng.permutation(8)[:blocks].astype(np.int32)
    run, stride = vectors * 16, (vectors + gap) * 16
    gpu = rng.integers(0, 256, (runs, 8, stride), np.uint8)
    bases = gpu.ctypes.data + np.arange(runs, dtype=np.int64) * gpu.strides[0]
    wanted = block_sums(np.array([gpu[:, page, :run].ravel() for page in pages]))
    sums, numbers = np.zeros((blocks, SUMS), np.uint64), np.array([run, blocks, runs], np.int32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (pages, bases)]
    kernel(ctas, *pointers, ctypes.c_longlong(stride), *(ctypes.c_void_p(one.ctypes.data) for one in (numbers, sums)))
    assert (sums == wanted).all()


@pytest.mark.parametrize("capability", (86, 90))
def test_it_fits(capability):
    found = nvrtc.kernel_resources(SOURCE_DIR / "block_sums.cu", capability, compile_options(DEFINES))
    assert set(found) == {"pkv_block_sums"}
    for used in found.values():
        assert used.registers <= 64 and used.spills == used.stack == 0  # decode's CTAs keep room beside it
