"""Rows that read their common pages once: right, planned as pkvsim plans, and right in captured steps that change."""
from __future__ import annotations

import cupy
import numpy as np
import pytest
import torch
from decode_ref import Case, attention, check, fill_owned, make_table, pages_of, run_poisoned
from shared_steps import make_shared_case, random_groups, share

from gpu import DecodeEngine, PrefixGroups, find_prefixes
from gpu.kernels.compile import load_kernel
from gpu.kernels.variant import TILE_TOKENS
from gpu.measure.timing import capture, shared_stream
from pkvsim import AttentionOptions, DecodeShape, make_schedule
from pkvsim.schedule import prefixes as host
from pkvsim.schedule.groups import PrefixGroups as HostGroups
from pkvsim.schedule.prefixes import SharingRule

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
BATCH, MAX_PAGES, POOL_PAGES = 12, 60, 800
ALL = SharingRule(0, 0)  # shares whatever can be
SPAN_FIELDS = 8  # of pkv::SpanTask


def on_gpu(groups: HostGroups) -> PrefixGroups:
    return PrefixGroups(torch.from_numpy(groups.group_of_row.copy()).cuda(),
                        torch.from_numpy(groups.prefix_pages.copy()).cuda())


def run_grouped(engine: DecodeEngine, case: Case, groups: object) -> tuple[torch.Tensor, torch.Tensor]:
    engine.plan(case.seq_lens, case.block_table, groups=groups)
    return run_poisoned(engine, case)


@pytest.mark.parametrize(("head_dim", "group", "page_size", "dtype"), [
    (128, 4, 16, "float16"), (128, 1, 16, "bfloat16"), (128, 8, 16, "float16"), (128, 16, 16, "float16"),
    (64, 4, 16, "bfloat16"), (64, 8, 1, "float16"), (192, 4, 16, "float16"), (256, 4, 16, "float16"),
    (128, 7, 16, "float16"), (128, 4, 3, "float16"), (128, 4, 64, "float16"),
])  # fmt: skip
def test_members_get_what_float64_gives(head_dim: int, group: int, page_size: int, dtype: str) -> None:
    shape = DecodeShape(2 * group, 2, head_dim, page_size)
    engine = DecodeEngine(shape, dtype=dtype)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        lens, groups = random_groups(rng, int(rng.integers(2, 80)), max(2, 1000 // page_size), page_size)
        case = make_shared_case(shape, lens, groups, dtype=dtype, seed=seed)
        results = [run_grouped(engine, case, given) for given in (on_gpu(groups), groups, on_gpu(groups))]
        check(*results[0], case, dtype=dtype)
        for out, lse in results[1:]:  # bit for bit
            assert bool((out == results[0][0]).all()) and bool((lse == results[0][1]).all())


@pytest.mark.parametrize(("rows", "prefix", "own", "groups"), [
    (64, 8192, 512, 1), (256, 2048, 256, 1), (8, 32768, 4096, 1), (64, 4096, 1024, 4), (16, 8192, 512, 1)
])  # fmt: skip
def test_large_groups(rows: int, prefix: int, own: int, groups: int) -> None:
    shape = DecodeShape(32, 8, 128, 16)
    given = HostGroups(np.arange(rows) // (rows // groups), [prefix // 16] * groups)
    case = make_shared_case(shape, np.full(rows, prefix + own, np.int32), given)
    engine = DecodeEngine(shape)
    together = run_grouped(engine, case, on_gpu(given))
    found = run_grouped(engine, case, "auto")
    engine.plan(case.seq_lens, case.block_table)
    apart = run_poisoned(engine, case)
    for out, lse in (together, found):
        assert float((out - apart[0]).abs().max()) <= 2e-3 and float((lse - apart[1]).abs().max()) <= 2e-3
    check(*together, case, dtype="float16")


def test_nothing_in_common_is_the_plain_step_to_the_bit() -> None:
    lens = np.random.default_rng(1).integers(0, 3000, 40).astype(np.int32)
    nobody = HostGroups([-1] * 40, [])
    case = make_shared_case(SHAPE, lens, nobody)
    engine = DecodeEngine(SHAPE)
    engine.plan(case.seq_lens, case.block_table)
    plain = run_poisoned(engine, case)
    for groups in (nobody, "auto"):
        out, lse = run_grouped(engine, case, groups)
        assert bool((out == plain[0]).all()) and bool((lse == plain[1]).all())


def test_captured_step_stays_right() -> None:
    """500 replays: groups form, grow, split and end, told and found, while lengths and tables change in place."""
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    seq_lens = torch.ones(BATCH, dtype=torch.int32, device="cuda")
    table = torch.zeros((BATCH, MAX_PAGES), dtype=torch.int32, device="cuda")
    groups = PrefixGroups(torch.full((BATCH,), -1, dtype=torch.int32, device="cuda"),
                          torch.zeros(4, dtype=torch.int32, device="cuda"))
    page = (POOL_PAGES, SHAPE.num_kv_heads, SHAPE.page_size, SHAPE.head_dim)
    k_pages, v_pages = torch.zeros((2, *page), dtype=torch.float16, device="cuda")
    q = torch.zeros((BATCH, SHAPE.num_q_heads, SHAPE.head_dim), dtype=torch.float16, device="cuda")
    outs = [(torch.empty_like(q), torch.empty((BATCH, SHAPE.num_q_heads), dtype=torch.float32, device="cuda"))
            for _ in range(2)]
    engines = [DecodeEngine(SHAPE), DecodeEngine(SHAPE, sharing_rule=ALL)]

    def step() -> None:
        for engine, given, (out, lse) in zip(engines, (groups, "auto"), outs):
            engine.plan(seq_lens, table, groups=given)
            for _ in range(2):  # two layers
                engine.run(q, k_pages, v_pages, out=out, lse=lse)

    with shared_stream():
        step()
        graph = capture(step)
        for _ in range(500):
            lens, given = random_groups(rng, BATCH, MAX_PAGES - 20, 16)
            lens = np.where(lens > 0, np.minimum(lens + rng.integers(0, 3), MAX_PAGES * 16), 0).astype(np.int32)
            if rng.random() < 0.2:
                given = HostGroups([-1] * BATCH, [])
            ids = rng.permutation(POOL_PAGES)[: int(pages_of(lens, 16).sum())].astype(np.int32)
            host_table = share(make_table(lens, 16, ids, max_pages=MAX_PAGES), lens, given, 16)
            for pool, scale in ((k_pages, 1.0), (v_pages, 0.5)):
                pool.fill_(float("nan"))
                fill_owned(pool, host_table, lens, scale=scale)
            seq_lens.copy_(torch.from_numpy(lens))
            table.copy_(torch.from_numpy(host_table))
            groups.group_of_row.copy_(torch.from_numpy(given.group_of_row))
            groups.prefix_pages.zero_()
            groups.prefix_pages[: len(given.prefix_pages)].copy_(torch.from_numpy(given.prefix_pages))
            q.normal_()
            for out, lse in outs:
                out.fill_(float("nan"))
                lse.fill_(float("nan"))
            graph.replay()
            case = Case(shape=SHAPE, q=q, k_pages=k_pages, v_pages=v_pages, block_table=table, seq_lens=seq_lens)
            wanted = attention(case)
            for out, lse in outs:
                check(out, lse, case, dtype="float16", wanted=wanted)


@pytest.mark.parametrize("case", range(20))
def test_device_plan_equals_the_simulators(case: int) -> None:
    rng = np.random.default_rng(case)
    lens, groups = random_groups(rng, int(rng.integers(2, 200)), int(rng.choice([3, 60, 2000])), 16)
    engine = DecodeEngine(SHAPE)
    width = max(1, int(pages_of(lens, 16).max()))
    engine.plan(torch.from_numpy(lens).cuda(), torch.zeros((len(lens), width), dtype=torch.int32, device="cuda"),
                groups=groups)  # fmt: skip
    shared_costs, most = engine.schedule_engine._shared.costs, 4096
    kernel = load_kernel("plan_spans.cu", "pkv_list_spans", {}, threads=32,
                         shared_bytes=16 * (len(lens) + len(groups.prefix_pages)))
    tasks = cupy.zeros((engine.schedule_engine.num_ctas, most, SPAN_FIELDS), dtype=cupy.int32)
    counts = cupy.zeros(engine.schedule_engine.num_ctas, dtype=cupy.int32)
    parts = cupy.full((len(lens), SHAPE.num_kv_heads, 3), -1, dtype=cupy.int32)
    arrays = [cupy.asarray(array) for array in (lens, groups.group_of_row, groups.prefix_pages)]
    kernel(engine.schedule_engine.num_ctas, (*(array.data.ptr for array in arrays), len(lens), len(groups.prefix_pages),
                             SHAPE.num_kv_heads, SHAPE.group_size, 1, 16, *engine.schedule_engine.costs, *shared_costs, 2**31 - 1,
                             tasks.data.ptr, most, counts.data.ptr, parts.data.ptr, 0),
           cupy.cuda.get_current_stream().ptr)  # fmt: skip
    counts = counts.get()
    listed = np.concatenate([block[:count] for block, count in zip(tasks.get(), counts)])
    expected = make_schedule("balanced", SHAPE, lens, tile_tokens=TILE_TOKENS, num_ctas=engine.schedule_engine.num_ctas,
                             costs=engine.schedule_engine.costs, groups=groups, shared_costs=shared_costs)
    names = expected.tasks.dtype.names
    np.testing.assert_array_equal(listed[:, 3:], np.stack([expected.tasks[name] for name in names], axis=1))
    np.testing.assert_array_equal(np.cumsum(counts)[: expected.num_ctas], expected.cta_offsets[1:])


@pytest.mark.parametrize("case", range(12))
def test_groups_are_found_as_python_finds_them(case: int) -> None:
    rng = np.random.default_rng(case)
    rows, pages = int(rng.integers(1, 300)), int(rng.integers(1, 600))
    table = rng.integers(0, 10**6, (rows, pages), dtype=np.int32)
    for row in range(1, rows):
        depth = int(rng.integers(0, pages + 1)) if rng.random() < 0.7 else 0
        table[row, :depth] = table[rng.integers(0, row), :depth]
    lens = rng.integers(0, pages * 16 + 1, rows).astype(np.int32)
    for rule in (ALL, SharingRule()):
        found = find_prefixes(torch.from_numpy(table).cuda(), torch.from_numpy(lens).cuda(), page_size=16, rule=rule)
        wanted = host.find_prefixes(table, lens, page_size=16, rule=rule)
        assert found.group_of_row.get().tolist() == wanted.group_of_row.tolist()
        count = len(wanted.prefix_pages)
        assert found.prefix_pages.get()[:count].tolist() == wanted.prefix_pages.tolist()


class Grouped:
    """An engine whose every plan has these groups."""

    def __init__(self, engine: DecodeEngine, groups: object) -> None:
        self._engine, self._groups = engine, groups

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def plan(self, *args: object, **given: object) -> None:
        self._engine.plan(*args, **given, groups=self._groups)


@pytest.mark.parametrize(("kv_dtype", "kv_scales"), [("float8_e4m3fn", "tensor"), ("int8", "token"), ("int8", "page")])
def test_8_bit_pages(kv_dtype: str, kv_scales: str) -> None:
    import test_gpu_kv_types as kv_types

    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
    lens = (700, 650, 640, 900, 33)
    step = kv_types.make_quantised(SHAPE, lens, options, seed=1)
    groups = HostGroups([0, 0, 0, 0, -1], [40])
    table = share(step.block_table.cpu().numpy(), np.array(lens), groups, 16)
    step.block_table.copy_(torch.from_numpy(table))
    engine = DecodeEngine(SHAPE, options=options)
    check(*kv_types.run(Grouped(engine, on_gpu(groups)), step), step.case(), dtype="float16")
