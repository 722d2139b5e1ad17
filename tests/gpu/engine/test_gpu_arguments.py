"""Arguments wrong in every way on a real GPU, in random order on one engine: named, nothing launched, it goes on."""
from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from argument_cases import BAD_ENGINES, BAD_SCALES, BAD_SPLITS, BAD_WRITERS, WRONG, is_harmless, names_of  # noqa: E402
from decode_ref import Case, check, csr_of, make_case  # noqa: E402
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu import BatchDecodeWithPagedKVCacheWrapper, CacheWriter, DecodeEngine  # noqa: E402
from pkvsim import DecodeShape  # noqa: E402
from pkvsim.reference.rope import Rope  # noqa: E402

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
LENS = (100, 33, 700)
FORMS = ("block table", "csr and lengths", "csr and last pages")
SCHEDULES = ("balanced", "workqueue", "split")
REFUSALS = (ValueError, TypeError, NotImplementedError)
POISON = 7.0


@functools.cache
def case() -> Case:
    return make_case(SHAPE, LENS)


@functools.cache
def engine(schedule: str) -> DecodeEngine:
    return DecodeEngine(SHAPE, schedule=schedule, splits=4)


def cuda(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def tables(form: str) -> dict[str, np.ndarray]:
    lens, table = case().seq_lens.cpu().numpy(), case().block_table.cpu().numpy()
    if form == "block table":
        return {"seq_lens": lens, "block_table": table}
    indptr, indices, last = (array.cpu().numpy() for array in csr_of(case()))
    return {"indptr": indptr, "indices": indices} | (
        {"seq_lens": lens} if form.endswith("lengths") else {"last_page_len": last}
    )


def run_arrays() -> dict[str, np.ndarray]:
    q = case().q.cpu().numpy()
    return {"q": q, "k_pages": case().k_pages.cpu().numpy(), "v_pages": case().v_pages.cpu().numpy(),
            "out": np.full_like(q, POISON), "lse": np.full(q.shape[:2], POISON, np.float32)}


def right_run(schedule: str, form: str) -> None:
    engine(schedule).plan(**{name: cuda(array) for name, array in tables(form).items()})
    out, lse = torch.full_like(case().q, float("nan")), torch.full(case().q.shape[:2], float("nan"), device="cuda")
    engine(schedule).run(case().q, case().k_pages, case().v_pages, out=out, lse=lse)
    torch.cuda.synchronize()
    check(out, lse, case(), dtype="float16")


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES), form=st.sampled_from(FORMS), data=st.data(), way=st.sampled_from(sorted(WRONG))
)
def test_wrong_tables(schedule: str, form: str, data: st.DataObject, way: str) -> None:
    good = tables(form)
    name = data.draw(st.sampled_from(sorted(good)))
    if is_harmless(name, "plan", way):
        return
    given_arrays = {other: cuda(array) for other, array in good.items()} | {name: WRONG[way].make(good[name], cuda)}
    with pytest.raises(REFUSALS) as caught:
        engine(schedule).plan(**given_arrays)
    assert str(caught.value).startswith(names_of(name, "plan")), str(caught.value)
    right_run(schedule, form)


@settings(max_examples=150, deadline=None)
@given(schedule=st.sampled_from(SCHEDULES), name=st.sampled_from(("q", "k_pages", "v_pages", "out", "lse")),
       way=st.sampled_from(sorted(WRONG)))
def test_wrong_arrays_of_a_run(schedule: str, name: str, way: str) -> None:
    if is_harmless(name, "run", way):
        return
    right_run(schedule, "block table")
    good = run_arrays()
    given_arrays = {other: cuda(array) for other, array in good.items()}
    outputs = given_arrays["out"], given_arrays["lse"]
    given_arrays[name] = WRONG[way].make(good[name], cuda)
    with pytest.raises(REFUSALS) as caught:
        engine(schedule).run(**given_arrays)
    assert str(caught.value).startswith(names_of(name, "run")), str(caught.value)
    torch.cuda.synchronize()
    assert all(bool((output == POISON).all()) for output in outputs), "nothing may be launched"
    right_run(schedule, "csr and last pages")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wrong_numbers(schedule: str) -> None:
    right_run(schedule, "block table")
    for scale in BAD_SCALES:
        with pytest.raises(REFUSALS, match="^scale"):
            engine(schedule).run(case().q, case().k_pages, case().v_pages, scale=scale)
    right_run(schedule, "block table")


@pytest.mark.parametrize("splits", BAD_SPLITS)
def test_wrong_splits(splits: object) -> None:
    with pytest.raises(REFUSALS, match="^splits"):
        DecodeEngine(SHAPE, schedule="workqueue", splits=splits).plan(case().seq_lens, case().block_table)


@pytest.mark.parametrize("name", BAD_ENGINES)
def test_wrong_engines(name: str) -> None:
    for value in BAD_ENGINES[name]:
        with pytest.raises(REFUSALS, match=name):
            DecodeEngine(**{"shape": SHAPE, name: value})


@pytest.mark.parametrize("name", BAD_WRITERS)
def test_wrong_writers(name: str) -> None:
    for value in BAD_WRITERS[name]:
        with pytest.raises(REFUSALS, match=name):
            CacheWriter(**{"shape": SHAPE, name: value})


@settings(max_examples=100, deadline=None)
@given(data=st.data(), way=st.sampled_from(sorted(WRONG)))
def test_wrong_arrays_of_an_append(data: st.DataObject, way: str) -> None:
    writer, good = writer_and_arrays()
    name = data.draw(st.sampled_from(sorted(good)))
    if is_harmless(name, "append", way):
        return
    right = {other: cuda(array) for other, array in good.items()}
    before = right["k_pages"].clone()
    with pytest.raises(REFUSALS) as caught:
        writer.append(**right | {name: WRONG[way].make(good[name], cuda)})
    assert str(caught.value).startswith(names_of(name, "append")), str(caught.value)
    torch.cuda.synchronize()
    assert torch.equal(right["k_pages"], before), "nothing may be launched"
    writer.append(**right)
    torch.cuda.synchronize()
    assert not torch.equal(right["k_pages"], before)


@functools.cache
def writer_and_arrays() -> tuple[CacheWriter, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    tokens, pages = (3, 2, 64), (20, 2, 16, 64)
    arrays = {
        "k_new": rng.standard_normal(tokens).astype(np.float16),
        "v_new": rng.standard_normal(tokens).astype(np.float16),
        "k_pages": np.zeros(pages, np.float16),
        "v_pages": np.zeros(pages, np.float16),
        "seq_lens": np.array([30, 9, 17], np.int32),
        "block_table": np.arange(24, dtype=np.int32).reshape(3, 8) % 20,
        "token_offsets": np.arange(4, dtype=np.int32),
        "q": rng.standard_normal((3, 8, 64)).astype(np.float16),
        "q_out": np.zeros((3, 8, 64), np.float16),
    }
    return CacheWriter(SHAPE, rope=Rope(style="half", inv_freq=np.ones(32))), arrays


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(("indptr", "indices", "last_page_len")),
    way=st.sampled_from(sorted(WRONG)),
    graph=st.booleans(),
)
def test_wrong_tables_of_flashinfers_wrapper(name: str, way: str, graph: bool) -> None:
    """But for other dtypes and strides, which FlashInfer's fixed buffers take up too, by copying."""
    good = tables("csr and last pages")
    workspace = torch.zeros(16, dtype=torch.uint8, device="cuda")
    buffers = tuple(torch.zeros(size, dtype=torch.int32, device="cuda") for size in (4, 200, 3)) if graph else ()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", graph, False, *buffers)
    heads = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
    wrong = WRONG[way].make(good[name], cuda)
    arrays = {other: cuda(array) for other, array in good.items()}
    if isinstance(wrong, torch.Tensor) and (
        wrong.dim() == 1 and way in ("another dtype", "16-bit integers", "elements apart")
    ):
        return  # cast or copied
    if is_harmless(name, "plan", way) or isinstance(wrong, np.ndarray):
        return
    with pytest.raises(REFUSALS):
        wrapper.plan(**arrays | {name: wrong}, **heads)
    wrapper.plan(**arrays, **heads)
    out = wrapper.run(case().q, (case().k_pages, case().v_pages))
    torch.cuda.synchronize()
    check(out, engine_lse(), case(), dtype="float16")


@functools.cache
def engine_lse() -> torch.Tensor:
    right_run("balanced", "block table")
    return engine("balanced").run(case().q, case().k_pages, case().v_pages)[1]
