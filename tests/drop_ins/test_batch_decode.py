"""The wrapper's logic on the CPU, with a torch engine in place of the CUDA one: arguments, tables, scales."""
from __future__ import annotations

import inspect
import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from batch_decode_on_torch import HEADS, WORKSPACE, Step, Wrapper, planned
from torch_paged import paged_attention

from gpu.drop_ins.flashinfer import arguments as flashinfer_arguments
from gpu.drop_ins.flashinfer import wrapper as batch_decode

RUN_ARGUMENTS = ("q", "paged_kv_cache", "args", "q_scale", "k_scale", "v_scale", "out", "lse", "return_lse",
                 "enable_pdl", "window_left", "sinks", "q_len_per_req",
                  "skip_softmax_threshold_scale_factor", "kv_cache_sf")


@pytest.mark.parametrize("combined", [False, True])
def test_out_and_lse_of_base_2(combined) -> None:
    step = Step([5, 0, 17, 4])
    wrapper = planned(step)
    cache = torch.stack([step.k, step.v], 1) if combined else (step.k, step.v)
    out, lse = step.expected()
    assert torch.equal(wrapper.run(step.q, cache), out)
    for found in (wrapper.run(step.q, cache, return_lse=True), wrapper.run_return_lse(step.q, cache),
                  wrapper.forward_return_lse(step.q, cache)):
        assert torch.equal(found[0], out)
        torch.testing.assert_close(found[1], lse)
    mine, my_lse = torch.empty_like(out), torch.empty_like(lse)
    found = wrapper.run(step.q, cache, out=mine, lse=my_lse, return_lse=True)
    assert found[0] is mine and found[1] is my_lse and torch.equal(mine, out)
    torch.testing.assert_close(my_lse, lse)


def test_scales_of_plan_run_and_forward() -> None:
    step = Step([9, 30])
    wrapper, cache = planned(step, sm_scale=0.3), (step.k, step.v)
    assert torch.equal(wrapper.run(step.q, cache), step.expected(0.3)[0])
    assert torch.equal(wrapper.run(step.q, cache, q_scale=2.0, k_scale=0.5), step.expected(0.3)[0])
    assert torch.equal(wrapper.run(step.q, cache, k_scale=3), step.expected(0.3 * 3)[0])
    assert torch.equal(wrapper.run(step.q, cache, v_scale=0.5), step.expected(0.3)[0] * 0.5)
    assert torch.equal(wrapper.forward(step.q, cache, sm_scale=0.7), step.expected(0.7)[0])
    assert torch.equal(wrapper.forward(step.q, cache), step.expected()[0])  # as FlashInfer: None is the default scale
    with pytest.raises(NotImplementedError, match="^k_scale"):
        wrapper.run(step.q, cache, k_scale=torch.tensor(1.0))


def test_one_plan_serves_every_layer_and_every_scale() -> None:
    wrapper = Wrapper(WORKSPACE, "HND")
    for seed in range(3):
        step = Step([5 + seed, 2], seed=seed)
        wrapper.begin_forward(*step.csr, *HEADS.values())
        for scale in (None, 2.0, None, 2.0):
            expected = step.expected(8**-0.5 * (scale or 1))[0]
            assert torch.equal(wrapper.run(step.q, (step.k, step.v), q_scale=scale), expected)
        wrapper.end_forward()
    (engine,) = wrapper._engines.values()
    assert (engine.plans, engine.runs) == (3, 12)


def test_window_soft_cap_and_sinks() -> None:
    step = Step([5, 0, 40, 12])
    cache, sinks = (step.k, step.v), torch.linspace(-2, 4, 4)
    wrapper = planned(step, window_left=6, logits_soft_cap=3.0)
    expected = step.expected(window=7, soft_cap=3.0)
    for options in ({}, {"window_left": 6}):
        found = wrapper.run(step.q, cache, return_lse=True, **options)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    found = wrapper.run(step.q, cache, sinks=sinks)
    assert torch.equal(found, step.expected(window=7, soft_cap=3.0, sinks=sinks)[0])
    assert torch.equal(wrapper.forward(step.q, cache, window_left=2), step.expected(window=3)[0])
    assert torch.equal(wrapper.forward(step.q, cache, logits_soft_cap=9.0), step.expected(soft_cap=9.0)[0])
    assert torch.equal(planned(step, logits_soft_cap=0.0).run(step.q, cache), step.expected()[0])


def test_several_query_tokens() -> None:
    step = Step([5, 40, 12])
    queries = torch.randn(3, 4, 4, 8).half()
    wrapper = Wrapper(WORKSPACE, "HND", use_tensor_cores=True)
    wrapper.plan(*step.csr, *HEADS.values(), q_len_per_req=4, is_causal=True)
    out, lse = paged_attention(queries, step.k, step.v, *step.tables)
    found = wrapper.run(queries.flatten(0, 1), (step.k, step.v), return_lse=True)
    assert torch.equal(found[0], out.flatten(0, 1))
    torch.testing.assert_close(found[1], lse.flatten(0, 1) / math.log(2))
    mine, my_lse = torch.empty(12, 4, 8).half(), torch.empty(12, 4)
    given = wrapper.run(queries.flatten(0, 1), (step.k, step.v), out=mine, lse=my_lse, return_lse=True, q_len_per_req=4)
    assert given[0] is mine and given[1] is my_lse and torch.equal(mine, found[0]) and torch.equal(my_lse, found[1])
    with pytest.raises(ValueError, match="^q: expected 3 rows of 4 tokens"):
        wrapper.run(step.q, (step.k, step.v))
    with pytest.raises(ValueError, match="^q_len_per_req: expected plan"):
        wrapper.run(step.q, (step.k, step.v), q_len_per_req=1)


@pytest.mark.parametrize("dtypes", [
    {"q_data_type": torch.bfloat16}, {"q_data_type": "bfloat16"}, {"q_data_type": None, "data_type": torch.bfloat16},
    {"q_data_type": "bfloat16", "kv_data_type": "bfloat16", "o_data_type": torch.bfloat16},
])
def test_dtypes_by_any_argument(dtypes) -> None:
    step = Step([7, 1], dtype=torch.bfloat16)
    assert torch.equal(planned(step, **dtypes).run(step.q, (step.k, step.v)), step.expected()[0])


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", torch.float8_e5m2])
def test_fp8_pages_with_their_scales(kv_dtype) -> None:
    step = Step([5, 0, 17])
    wrapper = planned(step, kv_data_type=kv_dtype)
    stored = tuple(pages.to(flashinfer_arguments.dtype_of(kv_dtype)) for pages in (step.k, step.v))
    step.k, step.v = (pages.half() for pages in stored)
    assert torch.equal(wrapper.run(step.q, stored), step.expected()[0])
    want = step.expected(8**-0.5 * 0.25)[0]
    for v_scale in (0.5, torch.tensor(0.5)):
        torch.testing.assert_close(wrapper.run(step.q, stored, k_scale=0.25, v_scale=v_scale), want * 0.5)
    for pages in ((step.k, step.v), (stored[0], step.v)):
        with pytest.raises(ValueError, match="^[kv]: expected plan.*float8"):
            wrapper.run(step.q, pages)
    wrapper.plan(*step.csr, *HEADS.values())
    assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected()[0])


def test_a_graph_wrapper_rewrites_its_buffers_in_place() -> None:
    buffers = tuple(torch.zeros(size, dtype=torch.int32) for size in (4, 30, 3))
    wrapper = Wrapper(WORKSPACE, "HND", True, False, *buffers)
    assert wrapper.is_cuda_graph_enabled and not wrapper.use_tensor_cores
    engines = set()
    for seed, lens in enumerate(([5, 0, 17], [30, 30, 40], [1, 2, 3])):
        step = Step(lens, seed=seed)
        wrapper.plan(*step.csr, *HEADS.values())
        engines.add(wrapper._engine(sinks=False).tables[0].data_ptr())
        assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected()[0])
        assert all(torch.equal(buffer[:len(array)], array) for buffer, array in zip(buffers, step.csr))
    assert len(engines) == 1
    with pytest.raises(ValueError, match="^q_len_per_req"):
        wrapper.plan(*step.csr, *HEADS.values(), q_len_per_req=2)
    with pytest.raises(ValueError, match="^last_page_len: expected the fixed batch size 3"):
        wrapper.plan(*Step([1, 2]).csr, *HEADS.values())
    with pytest.raises(ValueError, match="^indices: expected at most the buffer's 30"):
        wrapper.plan(*Step([90, 30, 30]).csr, *HEADS.values())
    same = batch_decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(WORKSPACE, *buffers, "HND")
    assert same.is_cuda_graph_enabled


def test_a_given_lse_has_base_2_whether_or_not_it_is_returned() -> None:
    step = Step([5, 0, 17])
    wrapper, lse = planned(step), torch.empty(3, 4)
    out = wrapper.run(step.q, (step.k, step.v), lse=lse)
    assert torch.equal(out, step.expected()[0])
    torch.testing.assert_close(lse, step.expected()[1])


def test_int64_indices_are_taken_as_they_are() -> None:
    step = Step([5, 0, 17])
    wrapper = Wrapper(WORKSPACE, "HND")
    indptr, indices, last_page_len = step.csr
    wrapper.plan(indptr, indices.long(), last_page_len, *HEADS.values())
    assert wrapper._engine(sinks=False).tables[1].dtype == torch.int64
    assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected()[0])


def test_nhd_pages_reach_the_engine_as_views() -> None:
    step = Step([5, 9])
    wrapper = Wrapper(WORKSPACE)
    wrapper.plan(*step.csr, *HEADS.values())
    nhd = tuple(pages.transpose(1, 2).contiguous() for pages in (step.k, step.v))
    assert torch.equal(wrapper.run(step.q, nhd), step.expected()[0])
    k_view, _ = flashinfer_arguments.pages_of(nhd, "NHD")
    assert k_view.data_ptr() == nhd[0].data_ptr() and k_view.shape == step.k.shape


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_pages_of_one_token_may_leave_its_axis_out(layout) -> None:
    pages = torch.randn(5, 2, 8)
    k, v = flashinfer_arguments.pages_of((pages, pages), layout)
    assert k.shape == v.shape == (5, 2, 1, 8) and torch.equal(k[:, :, 0], pages)


def test_run_takes_flashinfers_arguments() -> None:
    assert tuple(inspect.signature(Wrapper.run).parameters)[1:] == RUN_ARGUMENTS
