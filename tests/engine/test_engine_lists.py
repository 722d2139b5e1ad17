"""Lists of pages, masses and selections through the engine's host side, on a fake GPU that computes in float64."""
from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import fake_gpu

from pkvsim import DecodeShape, PageList, reference
from pkvsim.selection.by_name import select_pages
from pkvsim.selection.rules import Budget, Pins

SHAPE = DecodeShape(4, 2, 64, 16)
LENS = np.array([100, 0, 17, 300], np.int32)


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


class Step:
    """A step's arrays, on the host and on the fake GPU."""

    def __init__(self, gpu, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.host = {"q": rng.standard_normal((4, 4, 64)).astype(np.float16),
                     **{name: rng.standard_normal((90, 2, 16, 64)).astype(np.float16) for name in ("k", "v")},
                     "table": rng.permutation(90)[:80].reshape(4, 20).astype(np.int32), "lens": LENS.copy()}
        pages = np.sort(rng.permuted(np.tile(np.arange(7), (4, 2, 1)), axis=2)[..., :3], axis=2).astype(np.int32)
        pages[2] = [0, 1, 2]
        self.lists = PageList(pages, np.array([[3, 2], [3, 3], [1, 5], [0, 3]], np.int32))
        for name, array in self.host.items():
            setattr(self, name, gpu.array(array))
        self.on_gpu = PageList(*map(gpu.array, self.lists))
        self.out, self.lse = (gpu.array(np.full(s, np.nan, d)) for s, d in (((4, 4, 64), "f2"), ((4, 4), "f4")))

    def reference(self, function, *more):
        q, k, v = (self.host[name].astype(np.float64) for name in "qkv")
        return function(SHAPE, q, k, v, self.host["table"], self.host["lens"], *more)


def test_lists_reach_the_kernel(gpu) -> None:
    from gpu.decode_engine import DecodeEngine

    step, engine = Step(gpu), DecodeEngine(SHAPE)
    engine.plan(step.lens, step.table)
    for _ in range(2):
        engine.run(step.q, step.k, step.v, out=step.out, lse=step.lse, selected=step.on_gpu)
        want = step.reference(reference.selected_attention, step.lists)
        np.testing.assert_allclose(step.out.host, want[0], atol=2e-3)
        np.testing.assert_allclose(step.lse.host, want[1], atol=1e-5)
        step.on_gpu.counts.host[:] = step.lists.counts[:] = np.minimum(1, step.lists.counts)
    masses = gpu.array(np.full((4, 2, 20, 2), -np.inf, np.float32))
    engine.run(step.q, step.k, step.v, out=step.out, lse=step.lse, page_lse=masses)
    live = LENS > 0
    shares = np.exp(masses.host[live] - step.lse.host.reshape(4, 2, 1, 2)[live])
    np.testing.assert_allclose(shares.sum(axis=2), 1, atol=1e-5)


@pytest.mark.parametrize("method", ["mean_std", "quest"])
def test_selections_are_the_rules(gpu, method) -> None:
    from gpu.decode_engine import DecodeEngine
    from gpu.selection.page_selector import PageSelector
    from gpu.selection.page_summaries import PageSummaries

    step, budget, pins = Step(gpu, 1), Budget(0.3, 2), Pins(1, 1)
    selector = PageSelector(SHAPE, method=method, budget=budget, pins=pins)
    summaries = PageSummaries(SHAPE, step.k, kind=selector.summary)
    summaries.update(step.k, step.lens, step.table)
    selector.plan(step.lens, step.table)
    lists = selector.select(step.q, summaries)
    assert selector.select(step.q, summaries).pages is lists.pages  # a graph finds them where they were
    want = select_pages(method, SHAPE, *(step.host[name] for name in ("q", "k", "table", "lens")), budget=budget,
                        pins=pins)
    counts = lists.counts.host
    assert (counts == want.counts).all() and lists.pages.host.shape == (4, 2, 6)
    same = [len(np.intersect1d(lists.pages.host[i][: counts[i]], want.pages[i][: counts[i]])) for i in np.ndindex(4, 2)]
    assert sum(same) >= counts.sum() - 1  # summaries are rounded
    engine = DecodeEngine(SHAPE)
    engine.plan(step.lens, step.table)
    engine.run(step.q, step.k, step.v, out=step.out, lse=step.lse, selected=lists)
    got = step.reference(reference.selected_attention, PageList(lists.pages.host, counts))
    np.testing.assert_allclose(step.out.host, got[0], atol=2e-3)


def test_given_scores_and_budgets(gpu) -> None:
    from gpu.selection.page_selector import PageSelector

    step = Step(gpu, 2)
    selector = PageSelector(SHAPE, method=None, pins=Pins(1, 1), max_selected=9)
    selector.plan(step.lens, step.table)
    scores = gpu.array(np.tile(np.arange(20, dtype=np.float32), (4, 2, 1)))
    lists = selector.select(None, scores=scores, budgets=gpu.array(np.full((4, 2), 4, np.int32)))
    assert lists.counts.host.tolist() == [[4, 4], [0, 0], [2, 2], [4, 4]]
    assert lists.pages.host[3, 0, :4].tolist() == [0, 16, 17, 18]
    with pytest.raises(ValueError, match=r"scores: expected float32 \[4, 2, 20\]"):
        selector.select(None, scores=gpu.array(np.zeros((4, 2, 19), np.float32)))


@pytest.mark.parametrize("pins", [Pins(2**31 - 1, 2**31 - 1), Pins(1, 2**31 - 1), Pins(2**31 - 1, 0)])
def test_pins_of_all_pages_read_all_pages(gpu, pins) -> None:
    """The kernel adds its two numbers of pins in 32 bits."""
    from gpu.selection.page_selector import PageSelector

    step = Step(gpu, 2)
    selector = PageSelector(SHAPE, method=None, pins=pins)
    selector.plan(step.lens, step.table)
    lists = selector.select(None, scores=gpu.array(np.zeros((4, 2, 20), np.float32)))
    assert lists.counts.host[:, 0].tolist() == [-(-length // 16) for length in LENS]
    launch = selector._launch
    assert launch.sink_pages + launch.recent_pages < 2**31


@pytest.mark.parametrize("given", [{"budget": 0.1}, {"pins": (1, 2)}, {"budget": None}])
def test_what_is_no_budget_is_named(gpu, given) -> None:
    from gpu.selection.page_selector import PageSelector

    with pytest.raises(ValueError, match=f"^{next(iter(given))}: expected"):
        PageSelector(SHAPE, **given)


def test_queries_that_wide_loads_would_miss_are_refused(gpu) -> None:
    from gpu.selection.page_selector import PageSelector
    from gpu.selection.page_summaries import PageSummaries

    step, selector = Step(gpu, 1), PageSelector(SHAPE, method="quest")
    summaries = PageSummaries(SHAPE, step.k, kind="min_max")
    selector.plan(step.lens, step.table)
    room = np.zeros(step.host["q"].size + 16, np.float16)
    begin = -room.ctypes.data % 16 // 2
    for off, fits in ((0, True), (4, False), (1, False)):
        q = gpu.array(room[begin + off :][: step.host["q"].size].reshape(step.host["q"].shape))
        if fits:
            selector.select(q, summaries)
            continue
        with pytest.raises(ValueError, match="^q: expected an address in multiples of 16 bytes"):
            selector.select(q, summaries)


def test_strides_past_31_bits_are_refused_by_summaries(gpu) -> None:
    from gpu.selection.page_summaries import PageSummaries

    far = np.lib.stride_tricks.as_strided(np.zeros(64, np.float16), (1, 2, 16, 64), (0, 2**33, 128, 2))
    with pytest.raises(ValueError, match="^k_pages: expected head and token strides of less than 2.31"):
        PageSummaries(SHAPE, gpu.array(far))


@pytest.mark.parametrize(("change", "match"), [
    (lambda gpu, s: PageList(gpu.array(s.lists.pages.astype(np.int64)), s.on_gpu.counts), "selected.pages: expected int32"),
    (lambda gpu, s: PageList(s.on_gpu.pages, gpu.array(s.lists.counts[:3])), "selected.counts: expected int32"),
    (lambda gpu, s: PageList(s.lists.pages, s.on_gpu.counts), "selected.pages: expected an array on cuda:0"),
    (lambda gpu, s: PageList(gpu.array(np.zeros((4, 2, 3), np.int32).swapaxes(0, 1).copy().swapaxes(0, 1)),
                             s.on_gpu.counts), "selected.pages: expected contiguous"),
    (lambda gpu, s: [1], "selected: expected a PageList"),
])  # fmt: skip
def test_other_lists_are_refused(gpu, change, match) -> None:
    from gpu.decode_engine import DecodeEngine

    step, engine = Step(gpu), DecodeEngine(SHAPE)
    engine.plan(step.lens, step.table)
    with pytest.raises(ValueError, match=match):
        engine.run(step.q, step.k, step.v, selected=change(gpu, step))


def test_steps_that_serve_no_lists_say_so(gpu) -> None:
    from gpu.decode_engine import DecodeEngine
    from pkvsim import AttentionOptions, PrefixGroups

    step = Step(gpu)
    windowed, queue, grouped = (DecodeEngine(SHAPE, options=AttentionOptions(window=9)),
                                DecodeEngine(SHAPE, schedule="workqueue"), DecodeEngine(SHAPE))
    for engine, name, groups in ((windowed, "window", None), (queue, "workqueue", None),
                                 (grouped, "groups", PrefixGroups([0, 0, 0, 0], [1]))):
        engine.plan(step.lens, step.table, groups=groups)
        with pytest.raises(ValueError, match=f"selected: .*{name}"):
            engine.run(step.q, step.k, step.v, selected=step.on_gpu)
    with pytest.raises(ValueError, match="page_lse: expected float32"):
        engine = DecodeEngine(SHAPE)
        engine.plan(step.lens, step.table)
        engine.run(step.q, step.k, step.v, page_lse=gpu.array(np.zeros((4, 2, 20, 5), np.float32)))
