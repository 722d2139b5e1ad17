"""Page tables and pages in every form that callers have them, against float64; CSR under a graph whose rows change."""
from __future__ import annotations

import cupy
import numpy as np
import pytest
import torch
from decode_ref import Case, attention, check, csr_of, fill_owned, make_case, make_table, pages_of, run_poisoned

from gpu import DecodeEngine
from gpu.measure.timing import capture, shared_stream
from pkvsim import DecodeShape, make_schedule

FORMS = ("block table", "csr and lengths", "csr and last pages")
SCHEDULES = ("balanced", "workqueue", "split")
LENS = [5, 900, 0, 77, 2100, 16, 1]
BATCH, NUM_INDICES, POOL_PAGES = 8, 600, 700


def tables(case: Case, form: str, ids: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of plan() on the GPU."""
    if form == "block table":
        return {"seq_lens": case.seq_lens, "block_table": case.block_table.to(ids)}
    indptr, indices, last_page_len = csr_of(case)
    lengths = {"last_page_len": last_page_len} if form.endswith("pages") else {"seq_lens": case.seq_lens}
    return {"indptr": indptr, "indices": indices.to(ids)} | lengths


def moved(pages: torch.Tensor, layout: str, spread: int) -> torch.Tensor:
    """The pages as a view of `layout`, `spread` pages apart, with NaN between."""
    pages = pages if layout == "HND" else pages.transpose(1, 2)
    wide = torch.full((len(pages) * spread, *pages.shape[1:]), float("nan"), dtype=pages.dtype, device="cuda")
    wide[::spread] = pages
    return wide[::spread]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, ids: torch.dtype, page_size: int, layout: str) -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=page_size)
    case = make_case(shape, LENS, seed=page_size)
    wanted = attention(case)
    for schedule in SCHEDULES if page_size == 16 else SCHEDULES[:1]:
        engine = DecodeEngine(shape, schedule=schedule, layout=layout, splits=4)
        for spread in (1, 3):
            engine.plan(**tables(case, form, ids), validate=spread == 3)
            out, lse = torch.full_like(case.q, float("nan")), torch.full(case.q.shape[:2], float("nan"), device="cuda")
            engine.run(
                case.q, *(moved(pool, layout, spread) for pool in (case.k_pages, case.v_pages)), out=out, lse=lse
            )
            torch.cuda.synchronize()
            check(out, lse, case, dtype="float16", wanted=wanted)


@pytest.mark.parametrize("place", ["torch on the host", "numpy", "cupy", "mixed"])
@pytest.mark.parametrize("form", FORMS)
def test_from_anywhere(form: str, place: str) -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    ways = {"torch on the host": lambda t: t.cpu(), "numpy": lambda t: t.cpu().numpy(), "cupy": cupy.asarray}
    engine = DecodeEngine(shape)
    for seed in range(3):  # the second plan of arrays on the GPU takes the short way
        case = make_case(shape, np.random.default_rng(seed).permutation(LENS), seed=seed)
        given = tables(case, form, torch.int64)
        if place == "mixed":
            given = {name: array.cpu() if index % 2 else array for index, (name, array) in enumerate(given.items())}
        else:
            given = {name: ways[place](array) for name, array in given.items()}
        engine.plan(**given)
        check(*run_poisoned(engine, case), case, dtype="float16")


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("last_pages", [False, True])
def test_a_captured_step_follows_rows_that_change_on_the_device(ids: torch.dtype, last_pages: bool) -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    rng = np.random.default_rng(3)
    indptr = torch.zeros(BATCH + 1, dtype=torch.int32, device="cuda")
    indices = torch.zeros(NUM_INDICES, dtype=ids, device="cuda")
    lens, last = torch.zeros(2, BATCH, dtype=torch.int32, device="cuda")
    k_pages, v_pages = torch.zeros(2, POOL_PAGES, 2, 16, 128, dtype=torch.float16, device="cuda")
    q = torch.zeros(BATCH, 8, 128, dtype=torch.float16, device="cuda")
    out, lse = torch.empty_like(q), torch.empty(BATCH, 8, device="cuda")
    engine = DecodeEngine(shape)
    lengths = {"last_page_len": last} if last_pages else {"seq_lens": lens}

    def step() -> None:
        engine.plan(indptr=indptr, indices=indices, **lengths)
        engine.run(q, k_pages, v_pages, out=out, lse=lse)

    with shared_stream():
        step()
        graph = capture(step)
        for _ in range(60):
            ends = np.sort(rng.integers(0, NUM_INDICES - 10, BATCH - 1))
            pages = np.diff([0, *ends, NUM_INDICES - 10]) * (rng.random(BATCH) > 0.2)  # some rows are empty
            host = np.maximum(0, pages * 16 - rng.integers(0, 16, BATCH)).astype(np.int32)
            table = make_table(host, 16, rng.permutation(POOL_PAGES).astype(np.int32))
            for pool, scale in ((k_pages, 1.0), (v_pages, 0.5)):
                pool.fill_(float("nan"))
                fill_owned(pool, table, host, scale=scale)
            case = Case(shape, torch.randn_like(q), k_pages, v_pages, torch.from_numpy(table).cuda(),
                        torch.from_numpy(host).cuda())
            new = csr_of(case)
            indices.fill_(0x7FFFFFFF)
            for fixed, array in zip((indptr, indices, last, lens, q), (*new, case.seq_lens, case.q)):
                fixed[:len(array)].copy_(array)
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            check(out, lse, case, dtype="float16")


def test_the_device_plan_of_last_pages_is_pkvsims() -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    case = make_case(shape, LENS)
    engine = DecodeEngine(shape)
    engine.plan(**tables(case, "csr and last pages", torch.int32))
    planned = engine.schedule_engine
    tasks, offsets = planned.device_tasks()
    wanted = make_schedule("balanced", shape, LENS, num_ctas=planned.num_ctas, costs=planned.costs,
                           tile_tokens=16)
    np.testing.assert_array_equal(tasks, wanted.tasks)
    np.testing.assert_array_equal(offsets, wanted.cta_offsets)


def test_results_do_not_depend_on_the_form() -> None:
    shape = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
    case = make_case(shape, np.random.default_rng(0).integers(0, 6000, 24))
    assert pages_of(case.seq_lens.cpu().numpy(), 16).sum() > 1000
    engine, results = DecodeEngine(shape), []
    for form in FORMS:
        for ids in (torch.int32, torch.int64):
            engine.plan(**tables(case, form, ids))
            results.append(run_poisoned(engine, case))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]), "bit for bit"
