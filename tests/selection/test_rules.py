"""Pins, budgets, top k and top p, shared budgets: integers that the GPU must find too."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim import DecodeShape
from pkvsim.selection.budgets import across_heads, across_layers, by_weight
from pkvsim.selection.by_name import select_pages
from pkvsim.selection.evictions import kept_pages
from pkvsim.selection.masses import page_masses, page_scores, pooled
from pkvsim.selection.methods import epicache
from pkvsim.selection.rules import Budget, Pins, lists_of, softmax_mean, top_pages, top_share

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0]), min_size=1, max_size=30).map(np.array)
PINS = st.builds(Pins, st.integers(0, 3), st.integers(0, 3))


@given(scores=SCORES, pins=PINS, count=st.integers(0, 30))
def test_the_best_are_taken_and_the_pinned_first(scores, pins, count) -> None:
    count = min(count, len(scores))
    taken = top_pages(scores, count, pins)
    assert len(taken) == count and (np.diff(taken) > 0).all()
    rank = [(not pins.pinned(len(scores))[page], -scores[page], page) for page in range(len(scores))]
    assert sorted(rank)[:count] == sorted(rank[page] for page in taken)


@given(weights=SCORES.map(np.abs), pins=PINS, share=st.floats(0.05, 1.0))
def test_a_share_takes_the_fewest(weights, pins, share) -> None:
    taken = top_share(weights, share, pins)
    pinned = np.flatnonzero(pins.pinned(len(weights)))
    assert set(pinned) <= set(taken.tolist()) and (np.diff(taken) > 0).all()
    if weights.sum() > 0 and len(taken) < len(weights):
        assert weights[taken].sum() >= share * weights.sum() - 1e-9
    others = np.setdiff1d(taken, pinned)
    if len(others):  # without its least it would be too little
        assert weights[taken].sum() - weights[others].min() <= share * weights.sum() + 1e-9


def test_a_share_that_is_held_exactly_takes_no_more() -> None:
    assert top_share(np.array([1.0, 2.0, 1.0]), 0.5, Pins(0, 0)).tolist() == [1]
    assert top_share(np.array([1.0, 2.0, 1.0]), 0.75, Pins(0, 0)).tolist() == [0, 1]
    assert top_share(np.array([0.0, 4.0, 0.0]), 0.5, Pins(0, 0), least_pages=2).tolist() == [0, 1]


def test_a_head_far_below_the_others_counts_as_much() -> None:
    """Query heads of a group whose logits are thousands apart, of which exp() of one largest would leave nothing."""
    weights = softmax_mean(np.array([[0.0, np.log(3.0)], [-2000.0, -2000.0 + np.log(7.0)]]))
    np.testing.assert_allclose(weights, [(1 / 4 + 1 / 8) / 2, (3 / 4 + 7 / 8) / 2])


def test_masses_are_of_the_heads_own_sums() -> None:
    rng = np.random.default_rng(0)
    page_lse, lse = rng.standard_normal((2, 5, 3)), 3 + rng.standard_normal(6)  # [KV heads, pages, group]
    wanted = [[np.mean([np.exp(page_lse[head, page, q] - lse[head * 3 + q]) for q in range(3)]) for page in range(5)]
              for head in range(2)]
    np.testing.assert_allclose(page_masses(page_lse, lse), wanted)


@given(pages=st.integers(0, 10**6), fraction=st.floats(1e-4, 1.0), least=st.integers(0, 50), pins=PINS)
def test_budgets_are_integers(pages, fraction, least, pins) -> None:
    count = Budget(fraction, least).pages(pages, pins)
    assert min(pages, max(least, pins.sink_pages + pins.recent_pages)) <= count <= pages
    assert count <= max(least, pins.sink_pages + pins.recent_pages, int(np.ceil(pages * fraction)))
    assert count >= min(pages, pages * fraction - pages / 2**16)


@pytest.mark.parametrize("fraction", ["0.1", None, True, 0.0, 1.5, float("nan")])
def test_a_fraction_is_a_part(fraction) -> None:
    with pytest.raises(ValueError, match="^fraction: expected"):
        Budget(fraction)


@pytest.mark.parametrize("change, named", [
    ({"q": np.zeros((4, 8))}, "q"), ({"k_pages": np.zeros((3, 2, 4, 9))}, "k_pages"), ({"k_pages": None}, "k_pages"),
    ({"seq_lens": [-3]}, "seq_lens"), ({"seq_lens": [9]}, "block_table"), ({"block_table": [[0, -1]]}, "block_table"),
    ({"block_table": [[0, 3]]}, "block_table"), ({"name": ["quest"]}, "method")])
def test_what_pages_cannot_be_selected_of_is_named(change, named) -> None:
    step = {"name": "quest", "shape": DecodeShape(4, 2, 8, 4), "q": np.zeros((1, 4, 8)),
            "k_pages": np.zeros((3, 2, 4, 8)), "block_table": [[0, 1]], "seq_lens": [7]}
    assert select_pages(**step).counts.tolist() == [[2, 2]]
    with pytest.raises(ValueError, match=rf"^{named}(\[.*\])?: expected"):
        select_pages(**step | change)


def test_round_fractions_take_round_counts() -> None:
    assert [Budget(fraction, 0).pages(pages) for fraction, pages in ((0.3, 20), (0.1, 2048), (0.1, 10), (0.25, 8))] == [
        6, 205, 1, 2]  # fmt: skip
    with pytest.raises(ValueError, match="fraction: expected"):
        Budget(0.0)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 60), st.integers(0, 3), PINS, st.integers(0, 99))
def test_heads_share_a_budget(heads, pages, total, least, pins, seed) -> None:
    scores = np.random.default_rng(seed).integers(0, 5, (heads, pages)).astype(float)
    found = across_heads(scores, total, pins, least=least)
    own = [min(pages, max(least, int(pins.pinned(pages).sum())))] * heads
    assert sum(map(len, found)) == max(min(total, heads * pages), sum(own))
    left = [scores[head][np.setdiff1d(np.arange(pages), places)].max(initial=-1) for head, places in enumerate(found)]
    for head, places in enumerate(found):
        assert set(top_pages(scores[head], own[head], pins)) <= set(places)
        if len(places) > own[head]:  # what it has beyond its own is as good as anything that is left out
            assert max(left) <= scores[head][places].max()
    layers = across_layers([scores, scores + 1], total, pins, least=least)
    assert [len(layer) for layer in layers] == [heads, heads]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.integers(0, 100), st.integers(1, 20))
def test_shares_by_weight_add_up(weights, total, most) -> None:
    counts = by_weight(np.array(weights), total, most, least=1)
    assert (counts >= 1).all() and (counts <= most).all()
    assert counts.sum() == max(len(weights), min(total, most * len(weights)))


@pytest.mark.parametrize("weights", [[1.0, np.nan], [np.inf, 1.0], [-1.0, 2.0]])
def test_weights_that_nothing_can_be_shared_by_are_named(weights) -> None:
    with pytest.raises(ValueError, match="^weights: expected finite numbers from 0 on"):
        by_weight(np.array(weights), 5, 4)


def test_a_cosine_just_above_1_is_no_drift() -> None:
    assert epicache.layer_budgets(np.array([1.0 + 1e-15, 0.5]), 6, 9).tolist() == [1, 5]


def test_a_prompt_of_no_layers_is_named() -> None:
    with pytest.raises(ValueError, match="^layers: expected at least one"):
        kept_pages("snapkv", [], 2, Budget())


def test_tokens_become_pages() -> None:
    assert page_scores(np.arange(5.0)[None], 2).tolist() == [[1.0, 5.0, 4.0]]
    np.testing.assert_allclose(pooled(np.array([3.0, 0.0, 0.0, 3.0]), 3), [1.0, 1.0, 1.0, 1.0])
    masses = page_masses(np.log([[[0.25, 0.5], [0.75, 0.5]]]), np.zeros(2))
    np.testing.assert_allclose(masses, [[0.375, 0.625]])
    lists = lists_of([[np.array([1, 4]), np.array([0])]], 3)
    assert lists.pages.tolist() == [[[1, 4, -1], [0, -1, -1]]] and lists.counts.tolist() == [[2, 1]]
    with pytest.raises(ValueError, match="max_selected: expected at least 2"):
        lists_of([[np.array([1, 4])]], 1)
