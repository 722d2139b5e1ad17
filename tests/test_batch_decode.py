"""The wrapper's logic on the CPU, with a torch engine in place of the CUDA one: arguments, tables, scales, refusals."""
from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from torch_paged import TorchEngine, paged_attention

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu import arrays, batch_decode, flashinfer_arguments, validate
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4}
SHAPE = DecodeShape(4, 2, 8, 4)
WORKSPACE = torch.empty(0, dtype=torch.uint8)
RUN_ARGUMENTS = ("q", "paged_kv_cache", "args", "q_scale", "k_scale", "v_scale", "out", "lse", "return_lse",
                 "enable_pdl", "window_left", "sinks", "q_len_per_req",
                  "skip_softmax_threshold_scale_factor", "kv_cache_sf")


class Wrapper(batch_decode.BatchDecodeWithPagedKVCacheWrapper):
    def _make_engine(self, shape: DecodeShape, dtype: str, options: AttentionOptions) -> TorchEngine:
        return TorchEngine(shape, dtype, options)


class Step:
    """Random rows of given lengths, their pages and table in both forms."""

    def __init__(self, lens: list[int], *, dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
        rng, page_size = np.random.default_rng(seed), SHAPE.page_size
        torch.manual_seed(seed)
        pages = [-(-length // page_size) for length in lens]
        ids = rng.permutation(sum(pages) + 2).astype(np.int32)
        ends = np.cumsum([0, *pages]).astype(np.int32)
        last = np.array([(length - 1) % page_size + 1 if length else 0 for length in lens], np.int32)
        self.csr = torch.from_numpy(ends), torch.from_numpy(ids[:ends[-1]].copy()), torch.from_numpy(last)
        table = np.zeros((len(lens), max(1, *pages)), np.int32)
        for row, (begin, end) in enumerate(zip(ends, ends[1:])):
            table[row, :end - begin] = ids[begin:end]
        self.tables = torch.from_numpy(table), torch.tensor(lens, dtype=torch.int32)
        page = (len(ids), SHAPE.num_kv_heads, page_size, SHAPE.head_dim)
        self.k, self.v = torch.randn(page).to(dtype), torch.randn(page).to(dtype)
        self.q = torch.randn(len(lens), SHAPE.num_q_heads, SHAPE.head_dim).to(dtype)

    def expected(self, scale: float = 8**-0.5, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse of base 2)."""
        out, lse = paged_attention(self.q, self.k, self.v, *self.tables, scale, **options)
        return out, lse / math.log(2)


def planned(step: Step, **options: object) -> Wrapper:
    wrapper = Wrapper(WORKSPACE, "HND")
    wrapper.plan(*step.csr, *HEADS.values(), **options)
    return wrapper


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


@pytest.mark.parametrize("options, error, name", [
    ({"kv_layout": "HDN"}, KeyError, "kv_layout"),
    ({"use_cuda_graph": True}, ValueError, "paged_kv_indptr_buffer"),
    ({"jit_args": []}, NotImplementedError, "jit_args"),
    ({"backend": "trtllm-gen"}, NotImplementedError, "backend"),
])
def test_constructor_refuses(options, error, name) -> None:
    with pytest.raises(error, match=f"{name}: expected"):
        Wrapper(WORKSPACE, **{"kv_layout": "HND", **options})


@pytest.mark.parametrize("options, error", [
    ({"window_right": 1}, NotImplementedError), ({"pos_encoding_mode": "ALIBI"}, NotImplementedError),
    ({"pos_encoding_mode": "ROPE_NEOX"}, KeyError), ({"q_data_type": "float32"}, NotImplementedError),
    ({"kv_data_type": torch.int8}, NotImplementedError), ({"kv_data_type": "bfloat16"}, NotImplementedError),
    ({"o_data_type": "bfloat16"}, NotImplementedError), ({"fixed_split_size": 4}, NotImplementedError),
    ({"disable_split_kv": True}, NotImplementedError), ({"q_len_per_req": 2}, ValueError),
    ({"q_len_per_req": 9}, NotImplementedError), ({"q_len_per_req": 0}, ValueError),
    ({"is_causal": True}, NotImplementedError), ({"num_qo_heads": 3}, ValueError),
])
def test_plan_refuses_by_name_and_stays_usable(options, error) -> None:
    step = Step([5, 6])
    wrapper = Wrapper(WORKSPACE, "HND")
    with pytest.raises(error, match=next(iter(options)).replace("num_qo", "num_q")):
        wrapper.plan(*step.csr, **{**HEADS, **options})
    wrapper.plan(*step.csr, *HEADS.values())
    assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected()[0])


@pytest.mark.parametrize("options, error, name", [
    ({"q_len_per_req": 2}, ValueError, "q_len_per_req"),
    ({"kv_cache_sf": torch.zeros(1)}, NotImplementedError, "kv_cache_sf"),
    ({"skip_softmax_threshold_scale_factor": 1.0}, NotImplementedError, "skip_softmax"),
    ({"window_left": 5}, ValueError, "window_left"),
])
def test_run_refuses_by_name(options, error, name) -> None:
    step = Step([5, 6])
    with pytest.raises(error, match=name):
        planned(step).run(step.q, (step.k, step.v), **options)


def test_run_refuses_other_arrays_and_an_unplanned_step() -> None:
    step = Step([5, 6])
    wrapper = planned(step)
    with pytest.raises(RuntimeError, match="plan"):
        Wrapper(WORKSPACE, "HND").run(step.q, (step.k, step.v))
    with pytest.raises(ValueError, match="^q: expected plan"):
        wrapper.run(step.q.bfloat16(), (step.k, step.v))
    with pytest.raises(ValueError, match="^k: expected plan"):
        wrapper.run(step.q, (step.k.bfloat16(), step.v))
    with pytest.raises(KeyError, match="paged_kv_cache"):
        wrapper.run(step.q, [step.k, step.v])
    with pytest.raises(NotImplementedError, match="run args"):
        wrapper.run(step.q, (step.k, step.v), 1.0)


HEADS_AND_DIM = SHAPE.num_q_heads, SHAPE.head_dim


class CheckingEngine(TorchEngine):
    """With the real engine's way of naming arrays that are of no use."""

    def run(self, q, k_pages, v_pages, *, out=None, lse=None, scale=None, sinks=None):
        for name, array in (("out", out), ("lse", lse), ("sinks", sinks)):
            if array is not None:
                arrays.view(name, array)
        for name, array, shape in (
            ("q", q, (*q.shape[:-2], *HEADS_AND_DIM)),
            ("out", out, q.shape),
            ("lse", lse, q.shape[:-1]),
        ):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}")
        return super().run(q, k_pages, v_pages, out=out, lse=lse, scale=validate.check_scale(scale), sinks=sinks)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(),
    st.integers(-(2**40), -2),
    st.binary(max_size=2),
    st.lists(st.integers(), max_size=2),
    st.just(object()),
    st.builds(lambda n: torch.zeros((n,) * n), st.integers(0, 3)),
)
NAMED = {"num_qo_heads": "num_q", "num_kv_heads": "num_"}
# What FlashInfer takes or ignores, and so do we.
TAKEN = {
    "pos_encoding_mode": (),
    "window_left": (int,),
    "logits_soft_cap": (int, float, type(None)),
    "sm_scale": (int, float, type(None)),
    "data_type": (type(None),),
    "q_data_type": (type(None),),
    "kv_data_type": (type(None),),
    "o_data_type": (type(None),),
    "fixed_split_size": (type(None),),
    "v_scale": (int, float, type(None), torch.Tensor),
    "q_scale": (int, float, type(None)),
    "k_scale": (int, float, type(None)),
    "out": (type(None),),
    "lse": (type(None),),
    "sinks": (type(None),),
}


def wrapper_for_junk() -> tuple[Step, Wrapper]:
    wrapper = Wrapper(WORKSPACE, "HND")
    wrapper._make_engine = CheckingEngine
    step = Step([5, 6])
    wrapper.plan(*step.csr, *HEADS.values())
    return step, wrapper


def takes(name: str, value: object) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, TAKEN.get(name, ())) and finite and not isinstance(value, bool)


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(
        (
            "indptr",
            "indices",
            "last_page_len",
            *HEADS,
            "pos_encoding_mode",
            "window_left",
            "logits_soft_cap",
            "q_data_type",
            "kv_data_type",
            "sm_scale",
            "q_len_per_req",
            "fixed_split_size",
        )
    ),
    value=JUNK,
)
def test_junk_in_plan_is_refused_by_name_and_leaves_the_wrapper_usable(name, value) -> None:
    step, wrapper = wrapper_for_junk()
    good = dict(zip(("indptr", "indices", "last_page_len"), step.csr)) | HEADS
    if not takes(name, value) and not (isinstance(value, torch.Tensor) and value.dim() == 1):
        with pytest.raises(
            (ValueError, TypeError, NotImplementedError, KeyError),
            match=NAMED.get(name, name.removeprefix("kv_").removeprefix("q_d")),
        ):
            wrapper.plan(**good | {name: value})
    wrapper.plan(**good)
    assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected()[0])


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(("q", "paged_kv_cache", "q_scale", "k_scale", "v_scale", "out", "lse", "sinks")), value=JUNK
)
def test_junk_in_run_is_refused_by_name_and_leaves_the_wrapper_usable(name, value) -> None:
    step, wrapper = wrapper_for_junk()
    good = {"q": step.q, "paged_kv_cache": (step.k, step.v)}
    if (
        not takes(name, value)
        and name != "sinks"
        or name == "sinks"
        and not isinstance(value, (torch.Tensor, type(None)))
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError, KeyError), match=f"^'?(scale|{name})"):
            wrapper.run(**good | {name: value})
    assert torch.equal(wrapper.run(**good), step.expected()[0])


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
