"""What the wrapper refuses, by the argument's name, and that it stays usable."""
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from batch_decode_on_torch import HEADS, SHAPE, WORKSPACE, Step, Wrapper, planned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_paged import TorchEngine

from gpu.inputs import arrays
from gpu.inputs import checks as validate


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
