"""The FlashInfer drop-in on the GPU: against float64, in CUDA graphs, and against FlashInfer by one script's text."""
from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from decode_ref import Case, check, csr_of, make_case
from gpu_needs import flashinfer_kernels

from gpu import BatchDecodeWithPagedKVCacheWrapper
from pkvsim import DecodeShape

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
HEADS = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
LENS = [5, 900, 16, 77, 4000, 1]
has_flashinfer = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None,
                                    reason="flashinfer is not installed")


def workspace() -> torch.Tensor:
    return torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")


def csr(case: Case, *, on_host: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr, indices, last_page_len)."""
    arrays = csr_of(case)
    return tuple(array.cpu() for array in arrays) if on_host else arrays


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("combined", [False, True])
def test_against_float64(dtype: str, on_host: bool, combined: bool) -> None:
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND")
    for seed, lens in enumerate((LENS, [0, 300, 0], [2000] * 40, LENS[::-1])):
        case = make_case(SHAPE, lens, dtype=dtype, seed=seed, combined=combined)
        wrapper.plan(*csr(case, on_host=on_host), **HEADS, q_data_type=dtype)
        if combined:
            both = torch.as_strided(case.k_pages, (case.k_pages.shape[0], 2, *case.k_pages.shape[1:]),
                                    (case.k_pages.stride(0), case.k_pages.stride(0) // 2, *case.k_pages.stride()[1:]))
            out, lse = wrapper.run(case.q, both, return_lse=True)
        else:
            out, lse = wrapper.run(case.q, (case.k_pages, case.v_pages), return_lse=True)
        check(out, lse * math.log(2), case, dtype=dtype)


def test_plan_never_waits_for_the_gpu() -> None:
    cases = [make_case(SHAPE, np.random.default_rng(seed).permutation(LENS), seed=seed) for seed in range(4)]
    steps = [csr(case) for case in cases]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND")
    wrapper.plan(*steps[0], **HEADS)
    wrapper.run(cases[0].q, (cases[0].k_pages, cases[0].v_pages))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    behind = torch.cuda.Event()
    behind.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for case, step in zip(cases, steps):
            wrapper.plan(*step, **HEADS)
            results.append(wrapper.run(case.q, (case.k_pages, case.v_pages), return_lse=True))
        assert not behind.query(), "the host must be ahead of the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for case, (out, lse) in zip(cases, results):
        check(out, lse * math.log(2), case, dtype="float16")


@pytest.mark.parametrize("on_host", [False, True])
def test_a_captured_run_follows_later_plans(on_host: bool) -> None:
    buffers = tuple(torch.zeros(size, dtype=torch.int32, device="cuda") for size in (len(LENS) + 1, 2000, len(LENS)))
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND", True, False, *buffers)
    ids = np.random.default_rng(9).permutation(2000)
    cases = [make_case(SHAPE, np.random.default_rng(seed).integers(0, 4000, len(LENS)), seed=seed, num_pages=2000,
                       ids=np.roll(ids, seed * 100)) for seed in range(5)]
    q, k, v = cases[0].q.clone(), cases[0].k_pages.clone(), cases[0].v_pages.clone()
    wrapper.plan(*csr(cases[0], on_host=on_host), **HEADS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapper.run(q, (k, v), return_lse=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = wrapper.run(q, (k, v), return_lse=True)
    for case in cases:
        for fixed, new in ((q, case.q), (k, case.k_pages), (v, case.v_pages)):
            fixed.copy_(new)
        wrapper.plan(*csr(case, on_host=on_host), **HEADS)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(out, lse * math.log(2), case, dtype="float16")


def test_wrong_arrays_are_named_and_leave_the_wrapper_usable() -> None:
    case = make_case(SHAPE, LENS)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND")
    wrapper.plan(*csr(case), **HEADS)
    cache = case.k_pages, case.v_pages
    for name, arguments, options in (
        ("q", (case.q[:-1], cache), {}), ("k_pages", (case.q, (case.k_pages[..., :64], case.v_pages)), {}),
        ("out", (case.q, cache), {"out": torch.empty_like(case.q, dtype=torch.float32)}),
        ("lse", (case.q, cache), {"lse": torch.empty(3, device="cuda"), "return_lse": True}),
        ("q", (case.q.cpu(), cache), {}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            wrapper.run(*arguments, **options)
        out, lse = wrapper.run(case.q, cache, return_lse=True)
        check(out, lse * math.log(2), case, dtype="float16")


# What a user has, but for the module's name. `steps` and `tensor_cores` come from the test.
SCRIPT = """
import torch
from {module} import BatchDecodeWithPagedKVCacheWrapper

workspace_buffer = torch.zeros(128 * 1024 * 1024, dtype=torch.uint8, device="cuda")
wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace_buffer, "HND", use_tensor_cores=tensor_cores)
results = []
for indptr, indices, last_page_len, q, kv_cache in steps:
    torch.cuda.synchronize()  # FlashInfer's plan writes host memory that the last plan's copies may still be reading
    wrapper.plan(indptr, indices, last_page_len, 32, 8, 128, 16, pos_encoding_mode="NONE", q_data_type=q.dtype)
    results.append(wrapper.run(q, kv_cache))
    results.append(wrapper.run(q, kv_cache, return_lse=True))
    results.append(wrapper.run_return_lse(q, kv_cache, q_scale=0.5, k_scale=1.5, v_scale=0.25))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
    wrapper.run(q, kv_cache, out=out, lse=lse, return_lse=True, enable_pdl=False)
    results.append((out, lse))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
    wrapper.run(q, kv_cache, out=out, lse=lse)
    results.append((out, lse))
    results.append(wrapper.forward_return_lse(q, kv_cache, sm_scale=0.2))
torch.cuda.synchronize()
wrapper.begin_forward(*steps[0][:3], 32, 8, 128, 16, data_type=torch.float16, kv_data_type=steps[0][3].dtype,
                      q_data_type=steps[0][3].dtype, sm_scale=0.05)
results.append(wrapper.run(*steps[0][3:]))

batch_size = len(steps[0][2])
buffers = [torch.zeros(size, dtype=torch.int32, device="cuda") for size in (batch_size + 1, 4096, batch_size)]
wrapper = BatchDecodeWithPagedKVCacheWrapper(
    workspace_buffer, "HND", use_cuda_graph=True, use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=buffers[0],
    paged_kv_indices_buffer=buffers[1], paged_kv_last_page_len_buffer=buffers[2])
assert wrapper.is_cuda_graph_enabled
q, kv_cache = steps[0][3].clone(), tuple(pages.clone() for pages in steps[0][4])
wrapper.plan(*steps[0][:3], 32, 8, 128, 16, q_data_type=q.dtype)
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    wrapper.run(q, kv_cache, return_lse=True)
torch.cuda.current_stream().wait_stream(stream)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=stream):
    out, lse = wrapper.run(q, kv_cache, return_lse=True)
for indptr, indices, last_page_len, new_q, _ in steps:
    if len(last_page_len) == batch_size:
        torch.cuda.synchronize()
        wrapper.plan(indptr, indices, last_page_len, 32, 8, 128, 16, q_data_type=q.dtype)
        q.copy_(new_q)
        graph.replay()
        results.append((out.clone(), lse.clone()))
"""


# The same for what a plan may ask for. `variants` comes from the test.
VARIANTS_SCRIPT = """
import torch
from {module} import BatchDecodeWithPagedKVCacheWrapper

workspace_buffer = torch.zeros(128 * 1024 * 1024, dtype=torch.uint8, device="cuda")
results = []
for kv_layout, q, kv_cache, options in variants:
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace_buffer, kv_layout, use_tensor_cores=True)
    wrapper.plan(*csr, 32, 8, 128, 16, q_data_type=torch.float16, **options)
    results.append(wrapper.run(q, kv_cache, return_lse=True))
"""


@has_flashinfer
def test_variants_by_import_alone() -> None:
    lens = [5, 900, 16, 77, 4000, 8]
    case = make_case(SHAPE, lens, num_pages=1500)
    hnd = tuple(torch.randn_like(pages) for pages in (case.k_pages, case.v_pages))
    nhd = tuple(pages.transpose(1, 2).contiguous() for pages in hnd)
    both = torch.stack(nhd, 1)
    many = torch.randn(len(lens) * 4, 32, 128, device="cuda").half()
    variants = [("NHD", case.q, nhd, {}), ("NHD", case.q, both, {}), ("HND", case.q, hnd, {"window_left": 100}),
                ("NHD", case.q, nhd, {"window_left": 0}), ("HND", case.q, hnd, {"logits_soft_cap": 5.0}),
                ("NHD", case.q, both, {"logits_soft_cap": 30.0, "window_left": 15, "sm_scale": 0.2}),
                ("HND", many, hnd, {"q_len_per_req": 4}),
                ("NHD", many, nhd, {"q_len_per_req": 4, "window_left": 33, "is_causal": True})]
    found = {}
    for module in ("gpu", "flashinfer"):
        names = {"variants": variants, "csr": csr(case)}
        with flashinfer_kernels("variants of the wrapper"):
            exec(VARIANTS_SCRIPT.format(module=module), names)
        torch.cuda.synchronize()
        found[module] = names["results"]
    for variant, mine, theirs in zip(variants, found["gpu"], found["flashinfer"], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            torch.testing.assert_close(one, other, rtol=1e-2, atol=4e-3, msg=lambda text: f"{variant[0::3]}: {text}")


@has_flashinfer
@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("on_host", [False, True])
def test_one_script_by_import_alone(tensor_cores: bool, dtype: str, on_host: bool) -> None:
    steps = []
    pool = make_case(SHAPE, [1], dtype=dtype, num_pages=1500)
    pages = tuple(torch.randn_like(pages) for pages in (pool.k_pages, pool.v_pages))  # one pool, finite, for all steps
    for seed, lens in enumerate((LENS, LENS[::-1], [3000], [1, 16, 17, 32, 33, 1000], [700] * 30)):
        case = make_case(SHAPE, lens, dtype=dtype, seed=seed, num_pages=1500)
        steps.append((*csr(case, on_host=on_host), case.q, pages))
    found = {}
    for module in ("flashinfer", "gpu"):
        names = {"steps": steps, "tensor_cores": tensor_cores}
        with flashinfer_kernels(f"{dtype}, {'tensor' if tensor_cores else 'CUDA'} cores"):
            exec(SCRIPT.format(module=module), names)
        torch.cuda.synchronize()
        found[module] = names["results"]
    assert len(found["gpu"]) == len(found["flashinfer"]) == 5 * 6 + 1 + 3
    tolerance = {"float16": 4e-3, "bfloat16": 3.2e-2}[dtype]
    for mine, theirs in zip(found["gpu"], found["flashinfer"]):
        assert type(mine) is type(theirs)
        mine, theirs = (result if isinstance(result, tuple) else (result,) for result in (mine, theirs))
        for one, other in zip(mine, theirs, strict=True):
            assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            torch.testing.assert_close(one, other, rtol=1e-2, atol=tolerance)


@has_flashinfer
@pytest.mark.parametrize("arguments", [
    ("HDN",), ("HND", True), ("HND", True, False, torch.zeros(3)),
    ("HND", True, False, torch.zeros(3), torch.zeros(3), torch.zeros(3)),
])
def test_constructors_raise_the_same_errors(arguments: tuple) -> None:
    import flashinfer

    raised = []
    for wrapper in (flashinfer.BatchDecodeWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper):
        with pytest.raises(Exception) as caught:
            wrapper(workspace(), *arguments)
        raised.append(caught.type)
    assert raised[0] is raised[1]
