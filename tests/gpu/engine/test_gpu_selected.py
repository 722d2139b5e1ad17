"""Decode over lists of pages: right, repeatable, following lists that change under a graph; and what selects them.

    python -m pytest -q tests/gpu/engine/test_gpu_selected.py tests/gpu/engine/test_gpu_page_selection.py
    python examples/bench_selection.py --json selection.json      # the figures
"""
from __future__ import annotations

import numpy as np
import pytest
import torch
from selected_cases import GpuStep, assert_selected, on_gpu, random_lists

from gpu import DecodeEngine, PageList
from gpu.measure.timing import capture, shared_stream
from pkvsim import AttentionOptions, DecodeShape, reference

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)


@pytest.mark.parametrize(("head_dim", "group", "page_size", "dtype", "more"), [
    (128, 4, 16, "float16", {}), (128, 1, 16, "bfloat16", {}), (128, 8, 16, "float16", {"sinks": True}),
    (128, 16, 16, "float16", {}), (64, 4, 16, "bfloat16", {"soft_cap": 5.0}), (64, 8, 1, "float16", {}),
    (192, 4, 16, "float16", {"v_head_dim": 128}), (256, 4, 16, "float16", {}), (128, 7, 3, "float16", {}),
    (128, 4, 64, "float16", {}), (128, 32, 16, "float16", {}), (128, 4, 16, "float16", {"query_tokens": 4}),
    (64, 4, 1, "bfloat16", {"query_tokens": 3}), (128, 4, 16, "bfloat16", {"kv_dtype": "float8_e4m3fn"}),
    (128, 4, 16, "float16", {"kv_dtype": "int8", "kv_scales": "token"}),
    (64, 8, 16, "float16", {"kv_dtype": "int8", "kv_scales": "page", "query_tokens": 2}),
])  # fmt: skip
def test_lists_are_attended_alone(head_dim: int, group: int, page_size: int, dtype: str, more: dict) -> None:
    shape = DecodeShape(2 * group, 2, head_dim, page_size)
    for seed, lens in enumerate(((0, 5, 16, 700, 33), (1500,), tuple(range(4, 300, 5)))):
        step = GpuStep(shape, dtype, AttentionOptions(**more), lens, seed)
        first = step.run(selected=step.lists)
        assert_selected(first, step.expected(), dtype)
        again = step.run(selected=step.lists)
        seen = np.isfinite(step.expected()[1])
        assert all((a[seen] == b[seen]).all() for a, b in zip(first, again))


def folded(shape: DecodeShape, k: torch.Tensor, v: torch.Tensor, lens: np.ndarray, table: np.ndarray, lists: PageList):
    """The lists as rows of a plain step with one KV head (pkvsim.reference.fold_lists), pools as views."""
    empty = np.zeros((1, shape.num_kv_heads, 1, 1), np.float16)
    _, _, ids, tokens = reference.fold_lists(shape, empty, empty, table, lens, lists)
    pools = (pool.view(-1, 1, *pool.shape[2:]) for pool in (k, v))
    return DecodeShape(shape.group_size, 1, shape.head_dim, shape.page_size), *pools, ids, tokens


@pytest.mark.parametrize(("rows", "length", "share"), [(64, 8192, 0.1), (8, 32768, 0.1), (1, 131072, 0.1), (256, 500, 0.3),
                                                       (3, 4096, 1.0), (40, 5000, 0.02)])
def test_it_is_the_plain_step_of_folded_heads(rows: int, length: int, share: float) -> None:
    """Equal lists and ragged ones, whole GPUs of them."""
    shape, rng = DecodeShape(32, 8, 128, 16), np.random.default_rng(rows)
    pages = -(-length // 16)
    lens = np.full(rows, length, np.int32) - rng.integers(0, 16, rows).astype(np.int32)
    table = rng.permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    torch.manual_seed(rows)
    k, v = (torch.randn(rows * pages, 8, 16, 128, device="cuda").half() for _ in range(2))
    q = torch.randn(rows, 32, 128, device="cuda").half()
    engine = DecodeEngine(shape)
    engine.plan(on_gpu(lens), on_gpu(table))
    for ragged in (False, True):
        least = -(-int(lens.min()) // 16)  # pages that every row has
        room = max(1, int(share * least))
        lists = random_lists(rng, shape, lens, pages if ragged else room)
        if not ragged:
            places = np.sort(rng.permuted(np.tile(np.arange(least), (rows, 8, 1)), axis=2)[..., :room], axis=2)
            lists = PageList(places.astype(np.int32), np.full((rows, 8), room, np.int32))
        out, lse = engine.run(q, k, v, selected=PageList(*map(on_gpu, lists)))
        small, *pools, ids, tokens = folded(shape, k, v, lens, table, lists)
        plain = DecodeEngine(small)
        plain.plan(on_gpu(tokens), on_gpu(ids))
        want, want_lse = plain.run(q.view(rows * 8, 4, 128), *pools)
        assert float((out.view_as(want) - want).abs().max()) <= 2e-3
        live = want_lse > float("-inf")
        assert bool((live == (lse.view_as(want_lse) > float("-inf"))).all())
        assert float((lse.view_as(want_lse) - want_lse)[live].abs().max()) <= 2e-3


def test_a_captured_step_follows_its_lists() -> None:
    """300 replays of two layers: lists, counts, lengths and tables change in place."""
    rng = np.random.default_rng(5)
    rows, max_pages = 9, 60
    k, v = (torch.randn(700, 2, 16, 128, device="cuda").half() for _ in range(2))
    q = torch.randn(rows, 8, 128, device="cuda").half()
    lens, table = torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.zeros(rows, max_pages, dtype=torch.int32,
                                                                                   device="cuda")
    lists = PageList(torch.zeros(rows, 2, 50, dtype=torch.int32, device="cuda"),
                     torch.zeros(rows, 2, dtype=torch.int32, device="cuda"))
    engine, out = DecodeEngine(SHAPE), torch.empty_like(q)
    lse = torch.empty(rows, 8, device="cuda")

    def step() -> None:
        engine.plan(lens, table)
        for _ in range(2):
            engine.run(q, k, v, out=out, lse=lse, selected=lists)

    host_k, host_v, host_q = (x.double().cpu().numpy() for x in (k, v, q))
    with shared_stream():
        step()
        graph = capture(step)
        for turn in range(300):
            new = rng.integers(0, max_pages * 16 + 1, rows).astype(np.int32) * (rng.random(rows) < 0.9)
            new_table = rng.permutation(700)[: rows * max_pages].reshape(rows, max_pages).astype(np.int32)
            given = random_lists(rng, SHAPE, new, 50)
            for to, array in zip((lens, table, *lists), (new, new_table, *given)):
                to.copy_(torch.from_numpy(np.ascontiguousarray(array.astype(np.int32))))
            graph.replay()
            torch.cuda.synchronize()
            if turn % 10 == 0:
                want = reference.selected_attention(SHAPE, host_q, host_k, host_v, new_table, new, given)
                assert_selected((out.double().cpu().numpy(), lse.double().cpu().numpy()), want, "float16")
                assert bool((out[~torch.isfinite(lse)] == 0).all())


@pytest.mark.parametrize(("page_size", "more"), [(16, {}), (64, {"soft_cap": 3.0}), (16, {"query_tokens": 2}),
                                                 (16, {"kv_dtype": "int8", "kv_scales": "token"})])
def test_page_lse(page_size: int, more: dict) -> None:
    """The mass of every tile, of a dense step whose results stay what they were to the bit, and of a listed one."""
    shape = DecodeShape(8, 2, 128, page_size)
    step = GpuStep(shape, "float16", AttentionOptions(**more), (1000, 0, 16, 333, 4000), 2)
    host = step.step
    table = np.where(host.table == 0x7FFFFFFF, 0, host.table)
    want = reference.page_lse(shape, host.q.astype(np.float64), host.values()[0], table, host.lens, tokens=16,
                              options=host.options)  # fmt: skip
    dense = torch.full(want.shape, float("-inf"), device="cuda")
    got = step.run(selected=None, page_lse=dense)
    assert all((a == b).all() for a, b in zip(got, step.run(selected=None)))
    dense, seen = dense.cpu().numpy(), np.isfinite(want)
    np.testing.assert_allclose(dense[seen], want[seen], atol=3e-3)
    assert (dense[~seen] == -np.inf).all()

    room, each = step.lists.pages.shape[2], page_size // 16
    listed = torch.full((*want.shape[:2], room * each, *want.shape[3:]), float("-inf"), device="cuda")
    step.run(selected=step.lists, page_lse=listed)
    listed = listed.cpu().numpy()
    for (row, head), count in np.ndenumerate(host.lists.counts):
        for i, place in enumerate(host.lists.pages[row, head, :count]):
            whole = want[row, head, place * each : (place + 1) * each]
            mine = listed[row, head, i * each : (i + 1) * each][: len(whole)]
            there = np.isfinite(whole)
            np.testing.assert_allclose(mine[there], whole[there], atol=3e-3)


def test_what_is_not_served_is_named() -> None:
    step = GpuStep(SHAPE, "float16", AttentionOptions(), (100, 30), 0)
    pages, counts = step.lists
    for given, match in (
        (PageList(pages.long(), counts), "selected.pages: expected int32"), (PageList(pages[:1], counts), "selected.pages"),
        (PageList(pages, counts[:, :1].contiguous()), "selected.counts"), (PageList(pages.cpu(), counts), "cuda:0"),
        (PageList(pages.transpose(1, 2).contiguous().transpose(1, 2), counts), "contiguous"),
        ((pages,), "selected: expected a PageList"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            step.run(selected=given)
    with pytest.raises(ValueError, match="page_lse: expected float32"):
        step.run(selected=None, page_lse=torch.zeros(2, 2, 9, 5, device="cuda"))
    windowed = GpuStep(SHAPE, "float16", AttentionOptions(window=50), (100, 30), 0)
    with pytest.raises(ValueError, match="window"):
        windowed.run(selected=windowed.lists)
    queue = DecodeEngine(SHAPE, schedule="workqueue")
    queue.plan(step.lens, step.table)
    with pytest.raises(ValueError, match="selected: expected None for schedule 'workqueue'"):
        queue.run(step.q, step.k, step.v, selected=step.lists)
    step.run(selected=step.lists)
