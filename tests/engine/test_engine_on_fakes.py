"""The engine's host side on a fake GPU: every form of its tables reaches the kernels, and what it keeps for graphs."""
from __future__ import annotations

import weakref

import numpy as np
import pytest
from fake_gpu import fake_gpu
from fake_steps import agrees, make_step, run_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.engine.decode_kernels import DecodeKernels
from gpu.kernels.variant import kernel_config
from pkvsim import AttentionOptions, DecodeShape

FORMS = ("block table", "csr and lengths", "csr and last pages")
SCHEDULES = ("balanced", "workqueue", "split")
OPTIONS = (AttentionOptions(), AttentionOptions(window=9, soft_cap=3.0), AttentionOptions(sinks=True),
           AttentionOptions(query_tokens=3, window=20), AttentionOptions(v_head_dim=128))


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


def make_engine(*args, **options):
    from gpu.decode_engine import DecodeEngine

    return DecodeEngine(*args, **options)


def placed(gpu, tables: dict, place: str) -> dict:
    """On the fake GPU, on the host, or taking turns."""
    return {name: array if place == "host" or place == "mixed" and index % 2 else gpu.array(array)
            for index, (name, array) in enumerate(tables.items())}


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    ids=st.sampled_from(["int32", "int64"]),
    place=st.sampled_from(["gpu", "host", "mixed"]),
    schedule=st.sampled_from(SCHEDULES),
    page_size=st.sampled_from([1, 3, 16, 64]),
    layout=st.sampled_from(["HND", "NHD"]),
    spread=st.integers(1, 3),
    options=st.sampled_from(OPTIONS),
    lens=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    validate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_form_of_tables_and_pages(
    gpu, form, ids, place, schedule, page_size, layout, spread, options, lens, dtype, validate, seed
) -> None:
    shape = DecodeShape(4, 2, 64, page_size)
    lens = [length if length >= options.query_tokens else 0 for length in lens]
    step = make_step(shape, lens, dtype=dtype, seed=seed, options=options)
    engine = make_engine(shape, dtype, schedule, layout=layout, options=options, splits=2)
    run = run_arguments(gpu, step, layout=layout, spread=spread)
    engine.plan(**placed(gpu, step.tables(form, ids=ids), place), validate=validate)
    engine.run(**run)
    agrees(step, run)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.lists(st.integers(0, 60), min_size=1, max_size=3), st.sampled_from(FORMS),
                                st.sampled_from(["int32", "int64"])), min_size=2, max_size=6),
       schedule=st.sampled_from(SCHEDULES))
def test_plan_after_plan_of_any_form(gpu, steps, schedule) -> None:
    """Also the short way that a plan of known arrays takes; indices grow and shrink."""
    shape = DecodeShape(4, 2, 64, 4)
    engine = make_engine(shape, "float16", schedule, splits=3)
    for seed, (lens, form, ids) in enumerate(steps):
        for seed_of_twin in (seed, seed + 100):
            step = make_step(shape, lens, seed=seed_of_twin)
            run = run_arguments(gpu, step)
            engine.plan(**placed(gpu, step.tables(form, ids=ids), "gpu"))
            engine.run(**run)
            agrees(step, run)


def test_lengths_and_offsets_change_in_place(gpu) -> None:
    shape = DecodeShape(4, 2, 64, 4)
    engine, first = make_engine(shape), make_step(shape, [30, 9, 0], seed=1)
    tables = placed(gpu, first.tables("csr and last pages"), "gpu")
    engine.plan(**tables)
    for seed in range(3):
        step = make_step(shape, np.random.default_rng(seed).multinomial(30, [0.3, 0.3, 0.4]).tolist(), seed=seed)
        for name, new in step.tables("csr and last pages").items():
            tables[name].host[:len(new)] = new
        run = run_arguments(gpu, step)
        engine.run(**run)
        agrees(step, run)


def test_one_kernel_for_each_layout_of_tables(gpu) -> None:
    shape = DecodeShape(4, 2, 64, 4)
    step, engine = make_step(shape, [9, 3]), make_engine(shape)
    before = len(gpu.kernels)
    for _ in range(2):
        for form in FORMS:
            for ids in ("int32", "int64"):
                engine.plan(**placed(gpu, step.tables(form, ids=ids), "gpu"))
    made = [
        frozenset(name for name in kernel.defines if name.startswith(("TABLE", "LAST")))
        for kernel in gpu.kernels[before:]
    ]
    assert len(made) == len(set(made)) == 6 and frozenset() in made
    host = make_engine(shape, schedule="workqueue")
    before = len(gpu.kernels)
    for form in FORMS[1:]:
        host.plan(**placed(gpu, step.tables(form), "gpu"))
    assert len(gpu.kernels) == before + 1  # a host that plans knows the lengths


def workspace_of(engine) -> object:
    return engine.schedule_engine._partials.host


@pytest.mark.parametrize("schedule", ["workqueue", "split"])
def test_what_a_captured_step_reads_outlives_later_plans(gpu, schedule) -> None:
    shape = DecodeShape(4, 2, 64, 4)
    engine, step = make_engine(shape, schedule=schedule, splits=4), make_step(shape, [40, 33])
    engine.plan(step.seq_lens, step.block_table)
    gpu.capturing = True
    try:
        for _ in range(3):
            engine.run(**run_arguments(gpu, step))
    finally:
        gpu.capturing = False
    plan = engine.schedule_engine._plan
    kept = [
        weakref.ref(array)
        for array in (workspace_of(engine), plan.task_list.tasks.host, *(c.host for c in plan.copies))
    ]
    del plan
    big = make_step(shape, [80] * 12, seed=3)
    for _ in range(2):
        engine.plan(big.seq_lens, big.block_table)
        run = run_arguments(gpu, big)
        engine.run(**run)
        agrees(big, run)
    assert all(ref() is not None for ref in kept) and workspace_of(engine) is not kept[0]()
    assert len(engine.schedule_engine._in_graphs) == 1, "three runs of one plan are kept once"


def test_rows_past_a_grids_second_axis_are_merged_in_further_launches(gpu, monkeypatch) -> None:
    from gpu.engine import schedule_engine

    monkeypatch.setattr(schedule_engine, "MAX_GRID_ROWS", 3)
    shape = DecodeShape(4, 2, 64, 4)
    engine, step = make_engine(shape, schedule="workqueue", splits=2), make_step(shape, [9, 40, 33, 40, 21, 64, 40])
    engine.plan(step.seq_lens, step.block_table)
    seen = []
    merge = engine.schedule_engine._kernels.merge()
    monkeypatch.setattr(type(engine.schedule_engine._kernels), "merge", lambda self: lambda grid, values, stream: (
        seen.append((grid, values[-1])), merge(grid, values, stream)))
    run = run_arguments(gpu, step)
    engine.run(**run)
    agrees(step, run)
    rows = engine.schedule_engine._plan.task_list.buckets[0].rows.data.ptr
    assert seen == [((2, 3), rows), ((2, 3), rows + 12), ((2, 1), rows + 24)]


def test_host_tables_are_refused_where_another_gpu_is_current(gpu, monkeypatch) -> None:
    """Their copies would be there, and the kernel would read them on its own."""
    shape = DecodeShape(4, 2, 64, 4)
    engine, step = make_engine(shape), make_step(shape, [9, 40])
    monkeypatch.setattr(gpu.cupy.cuda.Device(), "id", 1)
    engine.plan(gpu.array(step.seq_lens), gpu.array(step.block_table))
    with pytest.raises(ValueError, match="^device: expected cuda:0, .* got cuda:1"):
        engine.plan(step.seq_lens, gpu.array(step.block_table))


def test_nothing_is_kept_of_steps_that_no_graph_captured(gpu) -> None:
    shape = DecodeShape(4, 2, 64, 4)
    engine = make_engine(shape, schedule="workqueue", splits=4)
    for seed in range(3):
        step = make_step(shape, [40 + 40 * seed] * 3, seed=seed)
        engine.plan(step.seq_lens, step.block_table)
        engine.run(**run_arguments(gpu, step))
    assert engine.schedule_engine._in_graphs == []


def test_a_captured_copy_of_host_tables_outlives_later_plans(gpu) -> None:
    shape = DecodeShape(4, 2, 64, 4)
    engine, step = make_engine(shape), make_step(shape, [40, 33])
    engine.plan(step.seq_lens, step.block_table)
    gpu.capturing = True
    engine.run(**run_arguments(gpu, step))
    gpu.capturing = False
    kept = [weakref.ref(copy.host) for copy in engine.schedule_engine._plan.copies]
    engine.plan(step.seq_lens, step.block_table)
    assert len(kept) == 2 and all(ref() is not None for ref in kept)


def test_the_pools_tables_go_to_the_stream_of_its_library(gpu, monkeypatch) -> None:
    import contextlib

    from gpu.cache.pool import PagedKVCache
    from gpu.inputs import arrays

    current = []

    @contextlib.contextmanager
    def on_stream(library, device):
        current.append(library)
        yield None
        current.pop()

    monkeypatch.setattr(arrays, "on_stream", on_stream)
    copied = []
    for library in ("cupy", "torch"):
        cache = PagedKVCache(DecodeShape(4, 2, 64, 4), num_pages=8, max_batch=2, max_seq_len=16, library=library)
        row = cache.allocate()
        cache.reserve([row], [5])
        monkeypatch.setattr(type(cache._lens), "set", lambda array, host: copied.append(current[-1]), raising=False)
        cache.device_tables()
    assert copied == ["cupy"] * 2 + ["torch"] * 2 and not current
    with pytest.raises(ValueError, match="^library: expected cupy or torch"):
        PagedKVCache(DecodeShape(4, 2, 64, 4), num_pages=8, max_batch=2, max_seq_len=16, library="numpy")


def test_auto_has_a_router_and_no_engine_of_its_own(gpu) -> None:
    shape = DecodeShape(4, 2, 64, 4)
    engine = make_engine(shape, schedule="auto")
    assert engine.schedule_engine is None and make_engine(shape).router is None
    step = make_step(shape, [40, 0, 33])
    run = run_arguments(gpu, step)
    with pytest.raises(RuntimeError, match="^run: call plan"):
        engine.run(**run)
    engine.plan(gpu.array(step.seq_lens), gpu.array(step.block_table))
    engine.run(**run)
    agrees(step, run)
    assert engine.router.counts == {"balanced": 1}
    for bad, named in ((DecodeShape(4, 2, 96, 4), "head_dim"), (DecodeShape(400, 2, 64, 4), "group_size")):
        with pytest.raises(ValueError, match=named):
            make_engine(bad, schedule="auto")
    with pytest.raises(ValueError, match="^scale"):
        make_engine(shape, schedule="auto", scale=float("nan"))


@pytest.mark.parametrize("overlap, num_tasks, wanted", [
    (True, 66, (132, True)), (True, 67, (67, False)), (True, 1, (2, True)), (True, 0, (1, False)),
    (True, 500, (132, False)), (False, 64, (64, False))])
def test_tasks_of_half_the_ctas_go_one_to_a_pair(overlap, num_tasks, wanted) -> None:
    config = kernel_config(DecodeShape(4, 1, 128, 16), "float16", 90)
    assert DecodeKernels(config, planned_on_gpu=False, overlap=overlap).task_grid(num_tasks, 132) == wanted


# Schedule, splits, lengths, then (CTAs, whether in pairs) of each decode launch with clusters and without: 2 KV heads.
LAUNCHES = [
    ("workqueue", 33, [1056], [(132, True)], [(66, False)]),
    ("workqueue", 34, [1088], [(68, False)], [(68, False)]),
    ("workqueue", 4, [500, 0, 400], [(32, True)], [(16, False)]),
    ("workqueue", 20, [640] * 5, [(132, False)], [(132, False)]),
    ("split", 8, [300, 640, 300, 0], [(64, True), (32, True)], [(32, False), (16, False)]),
    ("split", 32, [2048, 1024], [(128, True), (128, True)], [(64, False), (64, False)]),
    ("split", 32, [1024, 1024, 2048], [(128, False), (128, True)], [(128, False), (64, False)]),
    ("workqueue", 8, [0, 0], [(1, False)], [(1, False)]),
    ("balanced", 8, [300, 640], [(132, True)], [(132, True)]),
]


@pytest.mark.parametrize("capability", [90, 86])
@pytest.mark.parametrize("schedule, splits, lens, paired, alone", LAUNCHES)
def test_what_is_launched_on_how_many_ctas(schedule, splits, lens, paired, alone, capability) -> None:
    """132 SMs. Each launch of at most 66 tasks has a CTA of every pair for itself, on GPUs with clusters: also those of
    split, one for each length; that balanced's go in pairs is for gpu.kernels.launch to leave where there are none."""
    shape = DecodeShape(4, 2, 64, 16)
    with fake_gpu(compute_capability=capability, num_sms=132) as gpu:
        step, engine = make_step(shape, lens), make_engine(shape, schedule=schedule, splits=splits)
        engine.plan(step.seq_lens, step.block_table)
        run = run_arguments(gpu, step)
        engine.run(**run)
        agrees(step, run)
        grids = {kernel.name: kernel.grids for kernel in gpu.kernels if kernel.launches}
    merges = grids.pop("pkv_merge", [])
    assert list(grids.values()) == [paired if capability == 90 else alone]
    assert not any(pairs for _, pairs in merges), "a merge is a CTA a head and row"
