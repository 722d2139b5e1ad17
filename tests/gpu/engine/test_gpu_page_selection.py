"""PageSummaries and PageSelector: summaries that follow growth, lists that the rules give, all under one graph."""
from __future__ import annotations

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import pytest
import torch

from gpu import DecodeEngine, PageSelector, PageSummaries
from gpu.measure.timing import capture, shared_stream
from pkvsim import DecodeShape, reference
from pkvsim.selection import by_name, centroids
from pkvsim.selection.rules import Budget, Pins, top_pages
from pkvsim.selection.summaries import CODES, as_kept, encode, row_summaries


class Pool:
    """Rows of random keys on pages of a pool; pages differ in mean and spread, as real ones do."""

    def __init__(self, shape: DecodeShape, dtype: str, lens, *, seed: int, max_pages: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.shape, self.lens = shape, np.asarray(lens, np.int32)
        pages = -(-self.lens // shape.page_size)
        width = int(pages.max()) + 2 if max_pages is None else max_pages
        count = len(lens) * width
        self.table = rng.permutation(count).reshape(len(lens), width).astype(np.int32)
        inner = (shape.num_kv_heads, shape.page_size, shape.head_dim)
        spread = torch.empty(count, shape.num_kv_heads, 1, shape.head_dim, device="cuda").exponential_()
        mean = torch.randn(count, shape.num_kv_heads, 1, shape.head_dim, device="cuda")
        self.k = (mean + spread * torch.randn(count, *inner, device="cuda")).to(getattr(torch, dtype))
        self.v = torch.randn_like(self.k)
        self.q = torch.randn(len(lens), shape.num_q_heads, shape.head_dim, device="cuda").to(self.k.dtype)
        self.on_gpu = torch.from_numpy(self.lens).cuda(), torch.from_numpy(self.table).cuda()

    def keys(self, row: int, head: int) -> np.ndarray:
        ids = torch.from_numpy(self.table[row, : -(-int(self.lens[row]) // self.shape.page_size)].astype(np.int64)).cuda()
        return self.k[ids, head].reshape(-1, self.shape.head_dim)[: self.lens[row]].double().cpu().numpy()


@pytest.mark.parametrize(("method", "head_dim", "group", "page_size", "dtype", "summary_dtype"), [
    ("mean_std", 128, 4, 16, "float16", None), ("quest", 128, 4, 16, "bfloat16", None),
    ("mean_std", 64, 8, 16, "bfloat16", None), ("quest", 64, 3, 4, "float16", None),
    ("mean_std", 256, 8, 16, "float16", None), ("mean_std", 128, 16, 32, "float16", None),
    ("mean_std", 128, 4, 16, "float16", CODES), ("quest", 128, 16, 16, "bfloat16", CODES),
    ("mean_std", 64, 5, 16, "bfloat16", CODES), ("mean_std", 256, 8, 16, "float16", CODES),
    ("centroids", 128, 4, 16, "float16", None), ("centroids", 64, 12, 16, "bfloat16", None),
    ("centroids", 256, 8, 32, "float16", None), ("centroids", 128, 16, 4, "bfloat16", None),
])  # fmt: skip
def test_lists_are_those_of_the_rules(method: str, head_dim: int, group: int, page_size: int, dtype: str,
                                      summary_dtype: str | None) -> None:
    """Many short rows, which one CTA each scores, and a few long ones that many share."""
    shape, rule = DecodeShape(2 * group, 2, head_dim, page_size), by_name.method(method)
    budget, pins = Budget(0.1, 4), Pins(1, 2)
    for seed, lens in enumerate(((0, 1, 40 * page_size, 2000 * page_size - 3), (300 * page_size,) * 200)):
        pool = Pool(shape, dtype, lens, seed=seed)
        summaries = PageSummaries(shape, pool.k, dtype, kind=rule.SUMMARY, summary_dtype=summary_dtype)
        summaries.update(pool.k, *pool.on_gpu)
        selector = PageSelector(shape, dtype, method, budget=budget, pins=pins, summary_dtype=summary_dtype)
        selector.plan(*pool.on_gpu)
        pages, counts = (array.cpu().numpy() for array in selector.select(pool.q, summaries))
        pages_again, counts_again = (array.cpu().numpy() for array in selector.select(pool.q, summaries))
        for row in range(0, len(lens), max(1, len(lens) // 4)):
            row_pages = -(-int(pool.lens[row]) // page_size)
            count = budget.pages(row_pages, pins)
            assert (counts[row] == count).all() and (counts_again[row] == count).all()
            for head in range(2 * (row_pages > 0)):
                q = pool.q[row, head * group : (head + 1) * group].double().cpu().numpy()
                found = as_kept(pool.keys(row, head), page_size, rule.SUMMARY, summary_dtype)
                scores = rule.scores(q, found, head_dim**-0.5)
                got, want = pages[row, head, :count], top_pages(scores, count, pins)
                assert (pages_again[row, head, :count] == got).all()
                assert (np.diff(got) > 0).all() and got[0] >= 0 and got[-1] < row_pages
                pinned = pins.pinned(row_pages)
                assert set(np.flatnonzero(pinned)) <= set(got.tolist())
                edge = scores[[page for page in want if not pinned[page]]].min(initial=np.inf)
                wrong = np.setxor1d(got, want)
                np.testing.assert_allclose(scores[wrong], edge, rtol=0.03 if dtype == "float16" else 0.15)
                assert len(wrong) <= 0.15 * count + 2


def test_given_scores_select_exactly() -> None:
    shape, rng = DecodeShape(8, 2, 128, 16), np.random.default_rng(0)
    lens, width = np.array([16 * 8000, 16 * 77, 5, 0, 16 * 2048], np.int32), 8002
    selector = PageSelector(shape, "float16", None, pins=Pins(2, 3), max_selected=1000)
    selector.plan(torch.from_numpy(lens).cuda(), torch.zeros(5, width, dtype=torch.int32, device="cuda"))
    # Spread, equal, and far apart: the last need digits of all numbers, which the others do not.
    for scores in (rng.standard_normal((5, 2, width)), rng.integers(-2, 3, (5, 2, width)), np.zeros((5, 2, width)),
                   np.exp(20 * rng.standard_normal((5, 2, width)))):
        scores = scores.astype(np.float32)
        budgets = rng.integers(0, 1200, (5, 2)).astype(np.int32)
        lists = selector.select(None, scores=torch.from_numpy(scores).cuda(), budgets=torch.from_numpy(budgets).cuda())
        pages, counts = (array.cpu().numpy() for array in lists)
        for (row, head), count in np.ndenumerate(counts):
            row_pages = -(-int(lens[row]) // 16)
            assert count == min(max(budgets[row, head], 5), row_pages, 1000)
            want = top_pages(scores[row, head, :row_pages], count, Pins(2, 3))
            assert pages[row, head, :count].tolist() == want.tolist()


@pytest.mark.parametrize(("kind", "layout"), [("mean_std", "HND"), ("min_max", "NHD")])
def test_summaries_follow_growth(kind: str, layout: str) -> None:
    shape = DecodeShape(4, 2, 128, 16)
    pool = Pool(shape, "float16", (0, 1, 16, 17, 100, 1500), seed=3)
    given = pool.k if layout == "HND" else pool.k.transpose(1, 2).contiguous()
    summaries = PageSummaries(shape, given, kind=kind, layout=layout)
    for new_tokens in (None, 40, 1):
        summaries.array.fill_(float("nan"))
        summaries.update(given, *pool.on_gpu, new_tokens=new_tokens)
        for row, length in enumerate(pool.lens.tolist()):
            for head in range(2 * (length > 0)):
                want = row_summaries(pool.keys(row, head), 16, kind)
                got = summaries.array[torch.from_numpy(pool.table[row, : len(want)].astype(np.int64)).cuda(), head]
                first = 0 if new_tokens is None else max(0, length - new_tokens) // 16
                np.testing.assert_allclose(got[first:].cpu().numpy(), want[first:], atol=4e-3, rtol=2e-3)
                assert bool(got[:first].isnan().all())


@pytest.mark.parametrize("kind", ["mean_std", "min_max"])
def test_codes_follow_growth(kind: str) -> None:
    """Codes and scales are those of the keys that a page has, whoever had it before."""
    shape = DecodeShape(4, 2, 128, 16)
    pool = Pool(shape, "float16", (0, 1, 16, 17, 100, 1500), seed=3)
    summaries = PageSummaries(shape, pool.k, kind=kind, summary_dtype=CODES)
    for new_tokens in (None, 40, 1):
        summaries.array.fill_(255)
        summaries.scales.fill_(float("nan"))
        summaries.update(pool.k, *pool.on_gpu, new_tokens=new_tokens)
        for row, length in enumerate(pool.lens.tolist()):
            for head in range(2 * (length > 0)):
                codes, scales = encode(row_summaries(pool.keys(row, head), 16, kind), kind)
                ids = torch.from_numpy(pool.table[row, : len(codes)].astype(np.int64)).cuda()
                got, of = summaries.array[ids, head].cpu().numpy(), summaries.scales[ids, head].cpu().numpy()
                first = 0 if new_tokens is None else max(0, length - new_tokens) // 16
                np.testing.assert_allclose(of[first:], scales[first:], rtol=1e-5)
                off = np.abs(got[first:].astype(int) - codes[first:])
                assert off.max() <= 1 and off.mean() <= 0.01  # where the last bit of a quotient decides
                assert (got[:first] == 255).all() and np.isnan(of[:first]).all()


@pytest.mark.parametrize(("head_dim", "page_size", "dtype"), [(128, 16, "float16"), (64, 16, "bfloat16"),
                                                              (256, 4, "float16"), (128, 40, "bfloat16")])
def test_centroids_follow_growth(head_dim: int, page_size: int, dtype: str) -> None:
    """Codes and scales are those of the keys that a page has, also where these are fewer than the parts."""
    shape = DecodeShape(4, 2, head_dim, page_size)
    pool = Pool(shape, dtype, (0, 1, page_size, page_size + 1, 100, 1500), seed=3)
    repeated = int(pool.table[5, 3])
    pool.k[repeated] = pool.k[repeated][:, torch.arange(page_size, device="cuda") % 3]
    summaries = PageSummaries(shape, pool.k, dtype, kind="centroids")
    for new_tokens in (None, page_size + 4, 1):
        summaries.array.fill_(255)
        summaries.scales.fill_(float("nan"))
        summaries.update(pool.k, *pool.on_gpu, new_tokens=new_tokens)
        for row, length in enumerate(pool.lens.tolist()):
            for head in range(2 * (length > 0)):
                want = centroids.encode(centroids.row_centroids(pool.keys(row, head), page_size))
                ids = torch.from_numpy(pool.table[row, : len(want.codes)].astype(np.int64)).cuda()
                codes, scales = summaries.array[ids, head].cpu().numpy(), summaries.scales[ids, head].cpu().numpy()
                first = 0 if new_tokens is None else max(0, length - new_tokens) // page_size
                assert (codes[:first] == 255).all() and np.isnan(scales[:first]).all()
                np.testing.assert_allclose(scales[first:].astype(float), want.scales[first:].astype(float), rtol=2e-3)
                off = np.stack((codes[first:] & 15, codes[first:] >> 4)).astype(int) - np.stack(
                    (want.codes[first:] & 15, want.codes[first:] >> 4))
                assert np.abs(off).max(initial=0) <= 1 and np.count_nonzero(off) <= 0.01 * off.size


@pytest.mark.parametrize(("method", "summary_dtype"), [("mean_std", None), ("mean_std", CODES), ("centroids", None)])
def test_a_graph_selects_and_attends(method: str, summary_dtype: str | None) -> None:
    """Growth, summaries, selection and attention in one captured step, without the host; new queries every time."""
    shape, budget, pins = DecodeShape(32, 8, 128, 16), Budget(0.1, 4), Pins(1, 2)
    pool = Pool(shape, "float16", (3000, 100, 20000, 0, 513), seed=4, max_pages=1300)
    lens, table = pool.on_gpu
    kind = by_name.method(method).SUMMARY
    summaries = PageSummaries(shape, pool.k, kind=kind, summary_dtype=summary_dtype)
    summaries.update(pool.k, lens, table)
    selector = PageSelector(shape, method=method, budget=budget, pins=pins, summary_dtype=summary_dtype)
    engine = DecodeEngine(shape)
    out, lse = torch.empty_like(pool.q), torch.empty(pool.q.shape[:2], device="cuda")
    selector.plan(lens, table)
    engine.plan(lens, table)

    def step() -> None:
        summaries.update(pool.k, lens, table, new_tokens=1)
        lists = selector.select(pool.q, summaries)
        engine.run(pool.q, pool.k, pool.v, out=out, lse=lse, selected=lists)

    host = [x.double().cpu().numpy() for x in (pool.k, pool.v)]
    with shared_stream():
        step()
        graph = capture(step)
        for turn in range(20):
            lens += (lens > 0).int()
            pool.q.normal_()
            graph.replay()
            torch.cuda.synchronize()
            if turn % 5 == 0:
                lists = type(selector.lists)(*(array.cpu().numpy() for array in selector.lists))
                now = lens.cpu().numpy()
                want = reference.selected_attention(shape, pool.q.double().cpu().numpy(), *host, pool.table, now, lists)
                assert np.abs(out.double().cpu().numpy() - want[0]).max() <= 4e-3
                assert [int(count) for count in lists.counts[:, 0]] == [
                    budget.pages(-(-int(length) // 16), pins) for length in now]


def test_what_is_not_served_is_named() -> None:
    shape = DecodeShape(8, 2, 128, 16)
    pool = Pool(shape, "float16", (100, 30), seed=0)
    with pytest.raises(ValueError, match="method: expected one of"):
        PageSelector(shape, method="best")
    with pytest.raises(ValueError, match="head_dim: expected one of"):
        PageSelector(DecodeShape(8, 2, 192, 16))
    selector = PageSelector(shape)
    with pytest.raises(RuntimeError, match="plan"):
        selector.select(pool.q)
    selector.plan(*pool.on_gpu)
    with pytest.raises(ValueError, match="summaries: expected PageSummaries of kind mean_std"):
        selector.select(pool.q, PageSummaries(shape, pool.k, kind="min_max"))
    with pytest.raises(ValueError, match="summaries: expected PageSummaries of kind mean_std"):
        selector.select(pool.q, PageSummaries(shape, pool.k, summary_dtype=CODES))
    with pytest.raises(ValueError, match="summary_dtype: expected None"):
        PageSummaries(shape, pool.k, summary_dtype="int4")
    with pytest.raises(ValueError, match="q: expected float16"):
        selector.select(pool.q.float(), PageSummaries(shape, pool.k))
