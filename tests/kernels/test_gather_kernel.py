"""cuda_src/gather.cu moves the runs that it is told, all of them and nothing else; compiled for GPUs, and run on the CPU."""
import ctypes

import numpy as np
import nvrtc
import pytest
from cpp import STRICT, build
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUPPORT

from gpu.cache.tiers.transfer import DEFINES
from gpu.kernels.compile import SOURCE_DIR, compile_options

FEW = 32  # threads of a CTA that runs here


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    options = [option for option in STRICT if option != "-Werror"]
    folder = tmp_path_factory.mktemp("gather")
    return build(SUPPORT / "gather_harness.cpp", folder / "gather.so", *options, "-w", f"-DTHREADS={FEW}", "-DUNROLL=4",
                 f"-I{SUPPORT}").run  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    to_host=st.booleans(), ctas=st.integers(1, 3), blocks=st.integers(1, 6), layers=st.integers(1, 3),
    vectors=st.integers(1, 40), gap=st.integers(0, 3), data=st.data(),
)  # fmt: skip
def test_runs_go_where_they_belong(kernel, to_host, ctas, blocks, layers, vectors, gap, data):
    first = data.draw(st.integers(0, 2 * layers - 1))
    count = data.draw(st.integers(1, 2 * layers - first))
    pages = np.array(data.draw(st.permutations(range(8)))[:blocks], np.int32)
    rng = np.random.default_rng(vectors * 100 + blocks)
    run, stride = vectors * 16, (vectors + gap) * 16
    host = rng.integers(0, 256, (blocks, 2 * layers, run), np.uint8)
    gpu = rng.integers(0, 256, (2 * layers, 8, stride), np.uint8)
    wanted_host, wanted_gpu = host.copy(), gpu.copy()
    for block, page in enumerate(pages):
        for at in range(first, first + count):
            if to_host:
                wanted_host[block, at] = gpu[at, page, :run]
            else:
                wanted_gpu[at, page, :run] = host[block, at]
    hosts = host.ctypes.data + np.arange(blocks, dtype=np.int64) * host.strides[0]
    bases = gpu.ctypes.data + np.arange(2 * layers, dtype=np.int64) * gpu.strides[0]
    numbers = np.array([run, blocks, first, count], np.int32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (hosts, pages, bases)]
    kernel(ctypes.c_bool(to_host), ctas, *pointers, ctypes.c_longlong(stride), ctypes.c_void_p(numbers.ctypes.data))
    assert (host == wanted_host).all() and (gpu == wanted_gpu).all()


@pytest.mark.parametrize("capability", (86, 90))
def test_it_fits(capability):
    found = nvrtc.kernel_resources(SOURCE_DIR / "gather.cu", capability, compile_options(DEFINES))
    assert set(found) == {"pkv_gather", "pkv_scatter"}
    for used in found.values():
        assert used.registers <= 64 and used.spills == used.stack == 0  # decode's CTAs keep room beside it
