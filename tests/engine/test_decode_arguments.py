"""What run() gives its kernel is of the arrays at hand, whatever was planned, run or refused before."""
from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.engine.decode_kernels import BALANCED_VALUES
from gpu.inputs import arrays
from gpu.inputs.run import Run
from pkvsim import AttentionOptions, DecodeShape

SHAPE = DecodeShape(4, 2, 64, 4)
FORMS = ("block table", "csr and lengths", "csr and last pages")
OPTIONS = (AttentionOptions(), AttentionOptions(window=9, soft_cap=3.0), AttentionOptions(query_tokens=3, sinks=True),
           AttentionOptions(kv_dtype="float8_e4m3fn"), AttentionOptions(kv_dtype="int8", kv_scales="page"),
           AttentionOptions(kv_dtype="int8"))
LOG2_E = 1.4426950408889634


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


def make_engine(options: AttentionOptions, layout: str = "HND"):
    from gpu.decode_engine import DecodeEngine

    return DecodeEngine(SHAPE, options=options, layout=layout)


def launched(engine, run: dict, scale: float | None) -> tuple[int, dict]:
    """The grid and the values, by name, of a run that launches nothing."""
    seen = []
    engine = engine.schedule_engine
    engine._plan.decode = lambda grid, values, stream, pairs: seen.append((grid, values))
    engine.run(Run(**run, scale=scale))
    ((grid, values),) = seen
    return grid, dict(zip(BALANCED_VALUES, values, strict=True))


def make_tables(gpu, form: str, *, batch: int, pages: int, ids: str) -> dict:
    lens, last = np.zeros(batch, np.int32), np.ones(batch, np.int32)
    if form == "block table":
        return {"seq_lens": gpu.array(lens), "block_table": gpu.array(np.zeros((batch, pages), ids))}
    csr = {"indptr": gpu.array(np.zeros(batch + 1, np.int32)), "indices": gpu.array(np.zeros(pages, ids))}
    return csr | ({"seq_lens": gpu.array(lens)} if form == FORMS[1] else {"last_page_len": gpu.array(last)})


def make_run(gpu, options: AttentionOptions, layout: str, *, batch: int, pages: int, spread: int, scales: object,
             counts: bool) -> dict:
    heads = (batch, 4) if options.query_tokens == 1 else (batch, options.query_tokens, 4)
    inner = (2, 4) if layout == "HND" else (4, 2)
    kind = {None: np.float16, "int8": np.int8}.get(options.kv_dtype, np.uint8)
    run = {"q": np.zeros((*heads, 64), np.float16), "out": np.zeros((*heads, 64), np.float16),
           "lse": np.zeros(heads, np.float32), "sinks": np.zeros(4, np.float32) if options.sinks else None,
           "query_lens": np.ones(batch, np.int32) if counts and options.query_tokens > 1 else None,
           **{name: np.zeros((pages * spread, *inner, 64), kind)[::spread] for name in ("k_pages", "v_pages")}}
    if options.kv_scales in ("page", "token"):
        shape = (pages, 2) if options.kv_scales == "page" else (pages, *inner)
        run |= {name: np.ones(shape, np.float32) for name in ("k_scale", "v_scale")}
    elif options.kv_scales == "tensor":
        run |= {"k_scale": scales, "v_scale": np.ones(1, np.float32)} if isinstance(scales, float) else {}
    return {name: gpu.array(array) if isinstance(array, np.ndarray) else array for name, array in run.items()}


def expected(engine, tables: dict, run: dict, scale: float | None) -> dict:
    """What the kernel must be given, worked out from what the arrays themselves say; of other variants' values 0."""
    def at(array: object) -> int:
        return 0 if array is None or isinstance(array, float) else array.data.ptr

    engine = engine.schedule_engine
    options, csr = engine.options, "indptr" in tables
    ids = tables["indices" if csr else "block_table"]
    k, v = ([stride // run[name].itemsize for stride in run[name].strides] for name in ("k_pages", "v_pages"))
    head, token = (1, 2) if engine.layout == "HND" else (2, 1)
    base = SHAPE.head_dim**-0.5 if scale is None else scale
    numbers = [given if isinstance(given := run.get(name), float) else 1.0 for name in ("k_scale", "v_scale")]
    base, cap = base * numbers[0], options.soft_cap
    strides = [0, 0, 0]
    if options.kv_scales in ("page", "token"):
        page, *inner = (stride // 4 for stride in run["k_scale"].strides)
        strides = [page, *((*inner, 0) if options.kv_scales == "page" else inner if head == 1 else inner[::-1])]
    return {
        **{name: at(run.get(name)) for name in ("q", "k_pages", "v_pages", "query_lens", "sinks", "out", "lse")},
        "page_ids": at(ids), "lengths": at(tables["last_page_len" if "last_page_len" in tables else "seq_lens"]),
        "row_begins": at(tables.get("indptr")), "partials": at(engine._partials),
        "k_page_stride": k[0], "k_head_stride": k[head], "k_token_stride": k[token],
        "v_page_stride": v[0], "v_head_stride": v[head], "v_token_stride": v[token],
        "batch_size": run["q"].shape[0], "num_kv_heads": 2, "table_stride": ids.shape[-1],
        "num_pages": run["k_pages"].shape[0], "window": options.window or 0,
        "scale": base * LOG2_E if cap is None else base / cap, "cap": 0.0 if cap is None else cap * LOG2_E,
        "k_scales": at(run.get("k_scale")), "v_scales": at(run.get("v_scale")), "v_scale": numbers[1],
        "scale_page_stride": strides[0], "scale_head_stride": strides[1], "scale_token_stride": strides[2],
        **engine.costs._asdict(), "max_tokens": ids.shape[-1] * SHAPE.page_size,
    }  # fmt: skip


STEPS = st.lists(st.fixed_dictionaries({
    "form": st.sampled_from(FORMS), "ids": st.sampled_from(["int32", "int64"]), "batch": st.integers(1, 3),
    "pages": st.integers(1, 4), "spread": st.integers(1, 2), "scale": st.sampled_from([None, 0.5, 3]),
    "scales": st.sampled_from([None, 0.25]), "counts": st.booleans(), "twice": st.booleans(),
    "wrong": st.sampled_from([None, "q", "k_pages", "lse", "scale", "block_table"])}), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(options=st.sampled_from(OPTIONS), layout=st.sampled_from(["HND", "NHD"]), steps=STEPS)
def test_arguments_are_of_the_arrays_at_hand(gpu, options, layout, steps) -> None:
    """Also the second time around, of other arrays that are alike; also after a plan or run that was refused."""
    engine = make_engine(options, layout)
    for step in steps:
        sizes = {name: step[name] for name in ("batch", "pages")}
        for _ in range(2 if step["twice"] else 1):
            tables = make_tables(gpu, step["form"], ids=step["ids"], **sizes)
            run = make_run(gpu, options, layout, spread=step["spread"], scales=step["scales"], counts=step["counts"],
                           **sizes)
            engine.plan(**tables)
            grid, args = launched(engine, run, step["scale"])
            assert (grid, args) == (engine.schedule_engine.num_ctas, expected(engine, tables, run, step["scale"]))
        if step["wrong"] == "block_table":
            with pytest.raises(ValueError, match="^block_table"):
                engine.plan(gpu.array(np.zeros(5, np.int32)), gpu.array(np.zeros((4, 2), np.int32)))
        elif step["wrong"] is not None:
            wrong = run | {"scale": "1"} if step["wrong"] == "scale" else run | {step["wrong"]: gpu.array(np.zeros(3))}
            with pytest.raises(ValueError, match=f"^{step['wrong']}"):
                engine.run(**wrong)
        assert launched(engine, run, step["scale"]) == (grid, args)


@pytest.mark.parametrize("change", [
    lambda q: q[1:], lambda q: q.astype(np.float32), lambda q: q.reshape(3, 2, 128), lambda q: q.swapaxes(1, 2),
    lambda q: np.broadcast_to(q[:1], q.shape), lambda q: q[:, :, None]])
def test_another_shape_dtype_or_stride_is_checked_again(gpu, change) -> None:
    engine, tables = make_engine(AttentionOptions()), make_tables(gpu, "block table", batch=3, pages=2, ids="int32")
    run = make_run(gpu, engine.options, "HND", batch=3, pages=2, spread=1, scales=None, counts=False)
    engine.plan(**tables)
    launched(engine, run, None)
    changed = gpu.array(change(run["q"].host))
    with pytest.raises(ValueError, match="^q: expected"):
        engine.run(**run | {"q": changed})
    with pytest.raises(ValueError, match="^out: expected"):
        engine.run(**run | {"out": changed})
    with pytest.raises(ValueError, match="^q: expected an array on cuda:0"):
        engine.run(**run | {"q": gpu.array(run["q"].host, device=1)})


def test_a_batch_of_another_size_is_checked_again(gpu) -> None:
    engine = make_engine(AttentionOptions())
    run = make_run(gpu, engine.options, "HND", batch=3, pages=2, spread=1, scales=None, counts=False)
    engine.plan(**make_tables(gpu, "block table", batch=3, pages=2, ids="int32"))
    launched(engine, run, None)
    engine.plan(**make_tables(gpu, "block table", batch=2, pages=2, ids="int32"))
    with pytest.raises(ValueError, match="^q: expected"):
        engine.run(**run)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["none", "numpy", "fake", "list"]), max_size=9))
def test_fingerprints_are_each_arrays_own(gpu, kinds) -> None:
    made = {"none": lambda: None, "numpy": lambda: np.zeros(3), "fake": lambda: gpu.array(np.zeros((2, 3))),
            "list": lambda: [1]}
    given_arrays = [made[kind]() for kind in kinds]
    addresses, keys = arrays.fingerprints(given_arrays)
    assert list(zip(addresses, keys)) == [arrays.fingerprint(array) for array in given_arrays]
