"""Evictions: what the methods keep, and that pools give back exactly the rest, whole pages or pages of one head."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkvsim.memory.page_allocator import PageAllocator
from pkvsim.selection import evictions
from pkvsim.selection.evictions import METHODS, Seen, kept_pages
from pkvsim.selection.methods import defensivekv, h2o, snapkv, tova
from pkvsim.selection.rules import Budget, Pins, top_pages

KV_HEADS, GROUP = 2, 3
NUM_PAGES, PAGE_SIZE, ROWS, MAX_LEN = 14, 4, 4, 44
SEEDS = st.integers(0, 2**32 - 1)
ROW = st.integers(0, ROWS - 1)


def seen(tokens: int, seed: int, queries: int = 32) -> Seen:
    """A layer's causal attention of random weights, and norms of its values."""
    rng = np.random.default_rng(seed)
    queries = min(queries, tokens)
    logits = 2 * rng.standard_normal((KV_HEADS * GROUP, queries, tokens))
    logits[:, np.arange(tokens) > tokens - queries + np.arange(queries)[:, None]] = -np.inf
    weights = np.exp(logits)
    return Seen(weights / weights.sum(axis=-1, keepdims=True), rng.random((KV_HEADS, tokens)) + 0.1)


@pytest.mark.parametrize("tokens", [33, 100, 101])
@pytest.mark.parametrize("method", METHODS)
def test_budgets_are_kept(method: str, tokens: int) -> None:
    layers = [seen(tokens, seed) for seed in range(3)]
    for page_size in (1, 4, 16):
        pages, budget = -(-tokens // page_size), Budget(0.3, 2)
        count = budget.pages(pages)
        for whole in (False, True):
            kept = kept_pages(method, layers, KV_HEADS, budget, page_size=page_size, whole=whole)
            sizes = np.array([[len(own) for own in layer] for layer in kept])
            assert sizes.sum() == count * KV_HEADS * 3
            if method != "layer_defensivekv":
                assert (sizes.sum(axis=1) == count * KV_HEADS).all()
            for own in (own for layer in kept for own in layer):
                assert (np.diff(own) > 0).all() and (own >= 0).all() and (own < pages).all()
            if whole:
                assert all(np.array_equal(layer[0], own) for layer in kept for own in layer)


def test_tokens_kept_are_those_of_the_methods_scores() -> None:
    layers, budget, none = [seen(90, 1), seen(90, 2)], Budget(0.5, 1), Pins(0, 0)
    for at, layer in enumerate(layers):
        for head in range(KV_HEADS):
            def kept(method: str) -> list[int]:
                return kept_pages(method, layers, KV_HEADS, budget)[at][head].tolist()

            assert kept("tova") == top_pages(tova.scores(layer.attention, KV_HEADS)[head], 45, none).tolist()
            assert kept("snapkv") == top_pages(snapkv.scores(layer.attention, KV_HEADS)[head], 45, none).tolist()
            assert kept("h2o") == h2o.places(h2o.scores(layer.attention, KV_HEADS)[head], 45).tolist()
            assert kept("streaming_llm") == [0, 1, 2, 3, *range(90 - 41, 90)]
        scores = defensivekv.scores(layer.attention, layer.value_norms, KV_HEADS, 45)
        own = kept_pages("defensivekv", layers, KV_HEADS, budget)[at]
        least = min(scores[head, own[head]].min() for head in range(KV_HEADS))
        assert all(np.delete(scores[head], own[head]).max(initial=-1) <= least for head in range(KV_HEADS))
        # 12 pages are 48 tokens, of which some are forced.
        of_pages = evictions.scored_pages("defensivekv", layer, KV_HEADS, 12, page_size=4)
        tokens = defensivekv.scores(layer.attention, layer.value_norms, KV_HEADS, 48)
        np.testing.assert_allclose(of_pages, np.add.reduceat(tokens, range(0, 90, 4), axis=1))
    short = kept_pages("snapkv", [seen(32, 3)], KV_HEADS, budget)
    assert short[0][0].tolist() == list(range(32)), "a prompt of the window alone"
    with pytest.raises(ValueError, match="^method: expected one of streaming_llm"):
        kept_pages("best", layers, KV_HEADS, budget)
    with pytest.raises(ValueError, match="^value_norms: expected"):
        kept_pages("defensivekv", [Seen(layers[0].attention)], KV_HEADS, budget)


@pytest.mark.parametrize("method", ["tova", "snapkv", "defensivekv", "layer_defensivekv"])
def test_whole_pages_go_by_the_mean_of_the_heads_or_the_worst_case(method: str) -> None:
    layer = [np.array([[9.0, 0.0, 5.0, 4.0], [0.0, 1.0, 4.5, 4.6]])]  # [heads, pages]: the means are 4.5 0.5 4.75 4.3
    worst = method.endswith("defensivekv")
    assert [own.tolist() for own in evictions.kept_of_scores(method, layer, 1, whole=True)[0]] == [[0 if worst else 2]] * 2


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), page_size=st.integers(1, 5), fraction=st.floats(0.05, 1), seed=SEEDS)
def test_whole_pages_of_one_head_are_that_heads(tokens: int, page_size: int, fraction: float, seed: int) -> None:
    one = Seen(seen(tokens, seed).attention[:GROUP])
    for method in ("tova", "h2o"):
        kept = [kept_pages(method, [one], 1, Budget(fraction, 1), page_size=page_size, whole=whole) for whole in (0, 1)]
        assert kept[0][0][0].tolist() == kept[1][0][0].tolist()


class Machine(RuleBasedStateMachine):
    """Rows over whole pages, and from `fold` on over pages of one head, whose contents are numbers of their own.

    A lane is what has a table of its own: a row, or a head of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PageAllocator(num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_batch=ROWS, max_seq_len=MAX_LEN)
        self.contents = np.zeros((NUM_PAGES, KV_HEADS, PAGE_SIZE), np.int64)
        self.lanes = 1  # of each row
        self.tokens: dict[int, np.ndarray] = {}  # by lane, [heads of a page, tokens]
        self.written = 0

    def lanes_of(self, row: int) -> list[int]:
        return [row * self.lanes + lane for lane in range(self.lanes)]

    @property
    def rows(self) -> list[int]:
        return sorted({lane // self.lanes for lane in self.tokens})

    def snapshot(self) -> tuple:
        pool = self.pool
        return pool.block_table.tolist(), pool.seq_lens.tolist(), pool.free_pages, pool.owners.tolist()

    @precondition(lambda self: len(self.rows) < ROWS)
    @rule()
    def open(self) -> None:
        row = min(set(range(ROWS)) - set(self.rows))
        for lane in self.lanes_of(row):
            assert self.pool.allocate(lane) == lane
            self.tokens[lane] = np.zeros((KV_HEADS // self.lanes, 0), np.int64)

    @precondition(lambda self: self.rows)
    @rule(which=ROW, count=st.integers(1, 20))
    def grow(self, which: int, count: int) -> None:
        lanes = self.lanes_of(self.rows[which % len(self.rows)])
        old = [self.tokens[lane].shape[1] for lane in lanes]
        need = sum(-(-(length + count) // PAGE_SIZE) + -length // PAGE_SIZE for length in old)
        before = self.snapshot()
        if need > self.pool.num_free_pages or max(old) + count > MAX_LEN:
            with pytest.raises(ValueError):
                self.pool.extend(np.array(lanes), np.full(len(lanes), count))
            assert self.snapshot() == before
            return
        assert self.pool.extend(np.array(lanes), np.full(len(lanes), count)).tolist() == old
        for lane, length in zip(lanes, old):
            heads = KV_HEADS // self.lanes
            new = self.written + np.arange(1, heads * count + 1).reshape(heads, count)
            self.written += heads * count
            self.tokens[lane] = np.concatenate([self.tokens[lane], new], axis=1)
            at = np.arange(length, length + count)
            self.view()[self.pool.block_table[lane, at // PAGE_SIZE], :, at % PAGE_SIZE] = new.T

    @precondition(lambda self: self.rows and len(self.rows) < ROWS)
    @rule(which=ROW, share=st.sampled_from([1.0, 0.5]))
    def fork(self, which: int, share: float) -> None:
        source, row = self.rows[which % len(self.rows)], min(set(range(ROWS)) - set(self.rows))
        for lane, new in zip(self.lanes_of(source), self.lanes_of(row)):
            full = self.tokens[lane].shape[1] // PAGE_SIZE
            with pytest.raises(ValueError, match="^pages: expected at most"):
                self.pool.fork(lane, pages=full + 1)
            pages = round(share * full)
            assert self.pool.fork(lane, pages=pages, row=new) == new
            self.tokens[new] = self.tokens[lane][:, : pages * PAGE_SIZE].copy()

    @precondition(lambda self: any(self.tokens[lane].shape[1] for lane in self.tokens))
    @rule(which=ROW, method=st.sampled_from(METHODS), fraction=st.floats(0.05, 1), seed=SEEDS)
    def select_and_evict(self, which: int, method: str, fraction: float, seed: int) -> None:
        """A method's lists on random attention; heads whose lengths differ choose apart, as rows of their own."""
        row = self.rows[which % len(self.rows)]
        for lane in self.lanes_of(row):
            length = self.tokens[lane].shape[1]
            if length:
                lists = kept_pages(method, [seen(length, seed + lane)], KV_HEADS, Budget(fraction, 1),
                                   page_size=PAGE_SIZE, whole=self.lanes == 1)[0]  # fmt: skip
                self.evict(lane, lists[lane % self.lanes])

    @precondition(lambda self: self.rows)
    @rule(which=ROW, picks=st.lists(st.booleans(), min_size=MAX_LEN, max_size=MAX_LEN))
    def evict_any(self, which: int, picks: list[bool]) -> None:
        for lane in self.lanes_of(self.rows[which % len(self.rows)]):
            self.evict(lane, np.flatnonzero(picks[: len(self.pool.pages(lane))]))

    def evict(self, lane: int, kept: np.ndarray) -> None:
        pages, before = self.pool.pages(lane), self.snapshot()
        for wrong in ([len(pages)], [-1], [0, 0], [0.5]):
            with pytest.raises(ValueError, match="^kept: expected"):
                self.pool.evict(lane, wrong)
        assert self.snapshot() == before
        gone = self.pool.evict(lane, kept)
        assert self.pool.pages(lane).tolist() == pages[kept].tolist(), "what is kept stays where it is"
        alone = [page for page in np.delete(pages, kept).tolist() if before[3][page] == 1]
        assert sorted(gone.tolist()) == sorted(alone), "what another row has does not go"
        assert set(self.pool.free_pages) == {*before[2], *alone}
        assert [other for at, other in enumerate(self.pool.block_table.tolist()) if at != lane] == [
            other for at, other in enumerate(before[0]) if at != lane]  # fmt: skip
        at = (np.asarray(kept, int)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)
        self.tokens[lane] = self.tokens[lane][:, at[at < self.tokens[lane].shape[1]]]

    @precondition(lambda self: self.lanes == 1 and len(self.rows) > 1)
    @rule()
    def fold(self) -> None:
        """Pages of all heads become pages of one head, where they lie."""
        self.pool, self.lanes = self.pool.by_head(KV_HEADS), KV_HEADS
        self.tokens = {row * KV_HEADS + head: tokens[head : head + 1]
                       for row, tokens in self.tokens.items() for head in range(KV_HEADS)}  # fmt: skip

    @precondition(lambda self: self.rows)
    @rule(which=ROW)
    def free(self, which: int) -> None:
        for lane in self.lanes_of(self.rows[which % len(self.rows)]):
            self.pool.free(lane)
            del self.tokens[lane]

    def view(self) -> np.ndarray:
        return self.contents.reshape(NUM_PAGES * self.lanes, KV_HEADS // self.lanes, PAGE_SIZE)

    @invariant()
    def pages_are_accounted_for(self) -> None:
        pool, owned = self.pool, [self.pool.pages(lane) for lane in self.tokens]
        owners = np.bincount(np.concatenate([np.zeros(0, np.int64), *owned]), minlength=pool.num_pages)
        assert pool.owners.tolist() == owners.tolist()
        assert sorted([*np.flatnonzero(owners), *pool.free_pages]) == list(range(pool.num_pages)), "none lost, none twice"
        assert int((pool.block_table >= 0).sum()) == owners.sum()
        assert all(len(set(pages.tolist())) == len(pages) for pages in owned)

    @invariant()
    def rows_hold_what_was_kept(self) -> None:
        for lane, tokens in self.tokens.items():
            assert self.pool.seq_lens[lane] == tokens.shape[1]
            found = self.view()[self.pool.pages(lane)].swapaxes(0, 1).reshape(len(tokens), -1)
            assert found[:, : tokens.shape[1]].tolist() == tokens.tolist()


TestEvictions = Machine.TestCase
TestEvictions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_methods_are_those_that_score_tokens() -> None:
    for method in METHODS[1:]:
        assert evictions.token_scores(method, seen(50, 0), KV_HEADS, 20).shape == (KV_HEADS, 50)
    with pytest.raises(ValueError, match="^method: expected one that scores tokens"):
        evictions.token_scores("streaming_llm", seen(50, 0), KV_HEADS, 20)
