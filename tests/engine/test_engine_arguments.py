"""Every argument of the engine and the writer wrong in every way, on a fake GPU: named, and the engine stays usable."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from argument_cases import BAD_ENGINES, BAD_SCALES, BAD_SPLITS, BAD_WRITERS, WRONG, is_harmless, names_of
from fake_gpu import fake_gpu
from fake_steps import agrees, make_step, run_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import AttentionOptions, DecodeShape
from pkvsim.devices.device import get_device
from pkvsim.schedule.costs import BalancedCosts, paired

SHAPE = DecodeShape(4, 2, 64, 4)
FORMS = ("block table", "csr and lengths", "csr and last pages")
SCHEDULES = ("balanced", "workqueue", "split")
OPTIONS = AttentionOptions(sinks=True, query_tokens=2)
REFUSALS = (ValueError, TypeError, NotImplementedError)


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


def make_engine(schedule: str = "balanced", **options):
    from gpu.decode_engine import DecodeEngine

    return DecodeEngine(SHAPE, **{"schedule": schedule, "options": OPTIONS, "splits": 2, **options})


def right_run(gpu, engine, step, form: str) -> None:
    run = run_arguments(gpu, step)
    engine.plan(**{name: gpu.array(array) for name, array in step.tables(form).items()})
    engine.run(**run)
    agrees(step, run)


def refused(call, names: tuple[str, ...], launches) -> None:
    before = launches()
    with pytest.raises(REFUSALS) as caught:
        call()
    assert str(caught.value).startswith(names), str(caught.value)
    assert launches() == before, "nothing may be launched"


def counted(gpu):
    return lambda: sum(kernel.launches for kernel in gpu.kernels)


@pytest.mark.parametrize("name", BAD_ENGINES)
def test_a_wrong_engine(gpu, name) -> None:
    from gpu.decode_engine import DecodeEngine

    for value in BAD_ENGINES[name]:
        with pytest.raises(REFUSALS, match=name):
            DecodeEngine(**{"shape": SHAPE, name: value})


@pytest.mark.parametrize("name", BAD_WRITERS)
def test_a_wrong_writer(gpu, name) -> None:
    from gpu.cache.writer import CacheWriter

    for value in BAD_WRITERS[name]:
        with pytest.raises(REFUSALS, match=name):
            CacheWriter(**{"shape": SHAPE, name: value})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_array_of_plan_in_every_wrong_way(gpu, schedule, form) -> None:
    step = make_step(SHAPE, [30, 9, 17], options=OPTIONS)
    engine = make_engine(schedule)
    right_run(gpu, engine, step, form)
    tables = step.tables(form)
    for name, way in itertools.product(tables, WRONG):
        if is_harmless(name, "plan", way):
            continue
        given_tables = {other: gpu.array(array) for other, array in tables.items()}
        given_tables[name] = WRONG[way].make(tables[name], gpu.array)
        refused(lambda: engine.plan(**given_tables), names_of(name, "plan"), counted(gpu))
        run = run_arguments(gpu, step)
        engine.run(**run)  # by the plan that was there
        agrees(step, run)
    right_run(gpu, engine, step, form)


@pytest.mark.parametrize("missing", [name for form in FORMS for name in make_step(SHAPE, [3]).tables(form)])
def test_tables_that_are_missing_or_too_many(gpu, missing) -> None:
    step, engine = make_step(SHAPE, [30, 9], options=OPTIONS), make_engine()
    every = {**step.tables("block table"), **step.csr()}
    names = names_of("", "plan")
    refused(lambda: engine.plan(), names, counted(gpu))
    refused(lambda: engine.plan(**{name: gpu.array(array) for name, array in every.items()}), names, counted(gpu))
    for form in FORMS:
        tables = {name: gpu.array(array) for name, array in step.tables(form).items()}
        if missing in tables:
            refused(lambda: engine.plan(**{n: a for n, a in tables.items() if n != missing}), names, counted(gpu))
    right_run(gpu, engine, step, "block table")


def test_every_array_of_run_in_every_wrong_way(gpu) -> None:
    step = make_step(SHAPE, [30, 9, 17], options=OPTIONS)
    engine = make_engine()
    right_run(gpu, engine, step, "block table")
    good = {name: array.host for name, array in run_arguments(gpu, step).items()} | {
        "query_lens": np.full(3, 2, np.int32)
    }
    for name, way in itertools.product(good, WRONG):
        if is_harmless(name, "run", way):
            continue
        run = {other: gpu.array(array) for other, array in good.items()}
        run[name] = WRONG[way].make(good[name], gpu.array)
        refused(lambda: engine.run(**run), names_of(name, "run"), counted(gpu))
    for name, array in good.items():
        on_another = {other: gpu.array(array) for other, array in good.items()} | {name: gpu.array(array, device=1)}
        refused(lambda: engine.run(**on_another), (name,), counted(gpu))
        if name in ("q", "k_pages", "v_pages", "sinks"):
            refused(lambda: engine.run(**on_another | {name: None}), (name, "v_pages"), counted(gpu))
    for scale in BAD_SCALES:
        refused(lambda: engine.run(**run_arguments(gpu, step), scale=scale), ("scale",), counted(gpu))
    right_run(gpu, engine, step, "csr and last pages")


@pytest.mark.parametrize("splits", BAD_SPLITS)
def test_wrong_splits(gpu, splits) -> None:
    step = make_step(SHAPE, [30, 9, 17], options=OPTIONS)
    engine = make_engine("workqueue", splits=splits)
    refused(lambda: engine.plan(step.seq_lens, step.block_table), ("splits",), counted(gpu))


def test_run_before_plan(gpu) -> None:
    with pytest.raises(RuntimeError, match="plan"):
        make_engine().run(**run_arguments(gpu, make_step(SHAPE, [5], options=OPTIONS)))


@settings(max_examples=200, deadline=None)
@given(form=st.sampled_from(FORMS), ids=st.sampled_from(["int32", "int64"]), data=st.data(),
       place=st.sampled_from(["host", "gpu, validate=True"]))
def test_wrong_contents_are_found_where_they_are_looked_at(gpu, form, ids, data, place) -> None:
    """On the host always, on the GPU when asked to; page ids at the next run. What is wrong by one is wrong."""
    lens = [30, 3, 17]
    step = make_step(SHAPE, lens, options=OPTIONS)
    num_pages = len(run_arguments(gpu, step)["k_pages"].host)
    engine, tables = make_engine(), {name: array.copy() for name, array in step.tables(form, ids=ids).items()}
    name = data.draw(st.sampled_from(sorted(tables)))
    row = data.draw(st.integers(0, len(tables[name]) - 1))
    at = (row, 0) if name == "block_table" else (row,)
    pages = tables["block_table"].shape[1] if "block_table" in tables else -(-lens[row % 3] // SHAPE.page_size)
    least, most = {"seq_lens": (0, pages * SHAPE.page_size), "last_page_len": (1, SHAPE.page_size),
                   "indptr": (0, 10**6 - 1)}.get(name, (0, num_pages - 1))  # fmt: skip
    below, above = st.integers(-(2**31), least - 1), st.integers(most + 1, 2**31 - 1)
    tables[name][at] = data.draw(st.sampled_from([least - 1, most + 1]) | below | above)
    on_gpu = place != "host"
    tables = {key: gpu.array(array) if on_gpu else array for key, array in tables.items()}

    def call() -> None:
        engine.plan(**tables, validate=on_gpu or name in ("indices", "block_table"))
        engine.run(**run_arguments(gpu, step))

    refused(call, names_of(name, "plan"), counted(gpu))
    right_run(gpu, engine, step, form)


def writer_arguments(rng) -> dict[str, np.ndarray]:
    pages = (20, 2, 4, 64)
    return {
        "k_new": rng.standard_normal((3, 2, 64)).astype(np.float16),
        "v_new": rng.standard_normal((3, 2, 64)).astype(np.float16),
        "k_pages": np.zeros(pages, np.float16),
        "v_pages": np.zeros(pages, np.float16),
        "seq_lens": np.array([30, 9, 17], np.int32),
        "block_table": np.arange(24, dtype=np.int32).reshape(3, 8) % 20,
        "token_offsets": np.arange(4, dtype=np.int32),
        "q": rng.standard_normal((3, 4, 64)).astype(np.float16),
        "q_out": np.zeros((3, 4, 64), np.float16),
    }


def test_every_array_of_append_in_every_wrong_way(gpu) -> None:
    from gpu.cache.writer import CacheWriter
    from pkvsim.reference.rope import Rope

    writer = CacheWriter(SHAPE, rope=Rope(style="half", inv_freq=np.ones(32)))
    good = writer_arguments(np.random.default_rng(0))
    right = {name: gpu.array(array) for name, array in good.items()}
    writer.append(**right)
    for name, way in itertools.product(good, WRONG):
        if is_harmless(name, "append", way):
            continue
        given_arrays = right | {name: WRONG[way].make(good[name], gpu.array)}
        refused(lambda: writer.append(**given_arrays), names_of(name, "append"), counted(gpu))
    for name, scale in itertools.product(("k_scale", "v_scale"), (*BAD_SCALES, 0.5)):
        refused(lambda: writer.append(**right, **{name: scale}), (name,), counted(gpu))
    before = counted(gpu)()
    writer.append(**right)
    assert counted(gpu)() == before + 1


@pytest.mark.parametrize("options", [AttentionOptions(), AttentionOptions(query_tokens=8), AttentionOptions(window=64),
                                     AttentionOptions(kv_dtype="int8", kv_scales="token")])
def test_the_engine_pairs_ctas_as_its_gpus_model_says(gpu, options) -> None:
    """And as it is told, where it is."""
    from gpu.decode_engine import DecodeEngine

    shape, model = DecodeShape(32, 8, 128, 16), get_device("h200").routes["balanced"]
    engine = DecodeEngine(shape, options=options)
    columns = options.query_shape(shape).group_size
    pair = paired(model.costs.pair, columns, 128, options.kv_element_bytes(shape), shape.page_size)
    assert engine.schedule_engine.costs.pair == pair
    assert DecodeEngine(shape, options=options, costs=BalancedCosts(pair=3)).schedule_engine.costs == (0, 1, 0, 3)
