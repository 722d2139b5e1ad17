"""Balanced: a captured step stays right, and the device's plan is pkvsim's, task for task."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_ref import Case, check, fill_owned, make_table, pages_of

from gpu import DecodeEngine
from gpu.kernels.variant import TILE_TOKENS
from gpu.measure.timing import capture, shared_stream
from pkvsim import DecodeShape, make_schedule

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
BATCH, MAX_PAGES, POOL_PAGES = 12, 80, 1000


def test_captured_step_stays_right() -> None:
    """500 replays: lengths, tables, row order and the number of live rows change under the graph."""
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    seq_lens = torch.ones(BATCH, dtype=torch.int32, device="cuda")
    table = torch.zeros((BATCH, MAX_PAGES), dtype=torch.int32, device="cuda")
    page = (POOL_PAGES, SHAPE.num_kv_heads, SHAPE.page_size, SHAPE.head_dim)
    k_pages = torch.zeros(page, dtype=torch.float16, device="cuda")
    v_pages = torch.zeros_like(k_pages)
    q = torch.zeros((BATCH, SHAPE.num_q_heads, SHAPE.head_dim), dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    lse = torch.empty((BATCH, SHAPE.num_q_heads), dtype=torch.float32, device="cuda")
    engine = DecodeEngine(SHAPE, schedule="balanced")

    def step() -> None:
        engine.plan(seq_lens, table)
        engine.run(q, k_pages, v_pages, out=out, lse=lse)

    with shared_stream():
        step()
        graph = capture(step)
        for _ in range(500):
            lens = rng.integers(1, MAX_PAGES * SHAPE.page_size + 1, BATCH)
            lens[rng.random(BATCH) < rng.choice([0.0, 0.3, 0.8])] = 0
            lens = np.minimum(lens, rng.choice([5, 200, MAX_PAGES * SHAPE.page_size])).astype(np.int32)
            ids = rng.permutation(POOL_PAGES)[:int(pages_of(lens, 16).sum())].astype(np.int32)
            host_table = make_table(lens, 16, ids, max_pages=MAX_PAGES)
            for pool, scale in ((k_pages, 1.0), (v_pages, 0.5)):
                pool.fill_(float("nan"))
                fill_owned(pool, host_table, lens, scale=scale)
            seq_lens.copy_(torch.from_numpy(lens))
            table.copy_(torch.from_numpy(host_table))
            q.normal_()
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            graph.replay()
            check(out, lse, Case(shape=SHAPE, q=q, k_pages=k_pages, v_pages=v_pages, block_table=table,
                                 seq_lens=seq_lens), dtype="float16")


@pytest.mark.parametrize("case", range(40))
def test_device_plan_equals_the_simulators(case: int) -> None:
    rng = np.random.default_rng(case)
    batch = int(rng.integers(1, 257))
    lens = rng.integers(0, int(rng.choice([2, 100, 5000, 60000])) + 1, batch).astype(np.int32)
    pages = max(1, int(pages_of(lens, 16).max()))
    engine = DecodeEngine(SHAPE, schedule="balanced")
    engine.plan(torch.from_numpy(lens).cuda(), torch.zeros((batch, pages), dtype=torch.int32, device="cuda"))
    planned = engine.schedule_engine
    tasks, cta_offsets = planned.device_tasks()
    expected = make_schedule(
        "balanced",
        SHAPE,
        lens,
        tile_tokens=TILE_TOKENS,
        num_ctas=planned.num_ctas,
        costs=planned.costs,
        window=planned.options.reach,
    )
    np.testing.assert_array_equal(cta_offsets, expected.cta_offsets)
    np.testing.assert_array_equal(tasks, expected.tasks)
