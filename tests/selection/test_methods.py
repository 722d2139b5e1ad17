"""Every method against a plain statement of its paper's equations."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pkvsim.selection.methods import (
    defensivekv,
    epicache,
    h2o,
    kascade,
    louiskv,
    mean_std,
    quest,
    sentencekv,
    snapkv,
    streaming_llm,
    tova,
    twilight,
)
from pkvsim.selection.rules import Pins
from pkvsim.selection.summaries import row_summaries, summarize

HEADS, KV_HEADS, QUERIES, TOKENS = 6, 2, 12, 40  # groups of 3


@pytest.fixture
def attention() -> np.ndarray:
    """Causal: the queries are those of the last tokens."""
    logits = np.random.default_rng(0).standard_normal((HEADS, QUERIES, TOKENS)) * 2
    logits[:, np.arange(TOKENS) > TOKENS - QUERIES + np.arange(QUERIES)[:, None]] = -np.inf
    weights = np.exp(logits)
    return weights / weights.sum(axis=-1, keepdims=True)


def group(head: int) -> range:
    return range(head * 3, head * 3 + 3)


def test_summaries_bound_and_describe_a_page() -> None:
    keys = np.random.default_rng(1).standard_normal((11, 8))
    low, high = summarize(keys, "min_max")
    mean, std = summarize(keys, "mean_std")
    for d in range(8):
        column = [key[d] for key in keys]
        assert low[d] == min(column) and high[d] == max(column)
        np.testing.assert_allclose(mean[d], sum(column) / 11)
        np.testing.assert_allclose(std[d], (sum((x - mean[d]) ** 2 for x in column) / 11) ** 0.5)
    pages = row_summaries(keys, 4, "mean_std")
    assert pages.shape == (3, 2, 8) and (pages[2] == summarize(keys[8:], "mean_std")).all()
    with pytest.raises(ValueError, match="kind: expected one of"):
        summarize(keys, "median")


def test_quest_bounds_every_key() -> None:
    rng = np.random.default_rng(2)
    keys, q = rng.standard_normal((40, 8)), rng.standard_normal((3, 8))
    found = quest.logits(q, row_summaries(keys, 8, quest.SUMMARY), 0.5)
    for head, page in itertools.product(range(3), range(5)):
        own = keys[page * 8 : page * 8 + 8]
        want = 0.5 * sum(max(q[head, d] * own[:, d].min(), q[head, d] * own[:, d].max()) for d in range(8))
        np.testing.assert_allclose(found[head, page], want)
        assert (0.5 * own @ q[head] <= want + 1e-12).all()
    assert (quest.scores(q, row_summaries(keys, 8, "min_max"), 0.5) == found.max(axis=0)).all()


def test_mean_std_is_three_deviations_above_the_mean() -> None:
    rng = np.random.default_rng(3)
    keys, q = rng.standard_normal((40, 8)), rng.standard_normal((3, 8))
    logits = np.zeros((3, 5))
    for head, page in itertools.product(range(3), range(5)):
        own = keys[page * 8 : page * 8 + 8]
        variance = sum((q[head, d] * own[:, d].std()) ** 2 for d in range(8))
        logits[head, page] = 0.5 * (np.mean(own @ q[head]) + 3 * variance**0.5)
    summaries = row_summaries(keys, 8, mean_std.SUMMARY)
    np.testing.assert_allclose(mean_std.logits(q, summaries, 0.5), logits)
    weights = [np.exp(row) / np.exp(row).sum() for row in logits]
    np.testing.assert_allclose(mean_std.scores(q, summaries, 0.5), sum(weights) / 3)


def test_streaming_llm_keeps_both_ends() -> None:
    assert streaming_llm.places(20, 6, 16).tolist() == [0, 15, 16, 17, 18, 19]
    assert streaming_llm.places(20, 6, 1).tolist() == [0, 1, 2, 3, 18, 19]
    assert streaming_llm.places(3, 6, 16).tolist() == [0, 1, 2]


def test_h2o_accumulates(attention) -> None:
    total = h2o.scores(attention, KV_HEADS)
    for head, token in itertools.product(range(KV_HEADS), range(TOKENS)):
        want = np.mean([sum(attention[h, q, token] for q in range(QUERIES)) for h in group(head)])
        np.testing.assert_allclose(total[head, token], want)
    steps = np.zeros((KV_HEADS, 0))
    for q in range(QUERIES):
        seen = TOKENS - QUERIES + q + 1
        steps = h2o.accumulate(steps, attention[:, q, :seen].reshape(KV_HEADS, 3, -1).mean(axis=1))
    np.testing.assert_allclose(steps, total)
    kept = h2o.places(np.array([5.0, 1, 4, 0, 0, 0, 0, 0]), 4)
    assert kept.tolist() == [0, 2, 6, 7]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 14))
def test_h2o_keeps_the_last_ones_and_the_heaviest_of_the_others(masses, count) -> None:
    """Half of them each; of an odd number the heaviest are one more."""
    kept = h2o.places(np.array(masses, float), count).tolist()
    count = min(count, len(masses))
    recent = set(range(len(masses) - count // 2, len(masses)))
    others = sorted((mass for at, mass in enumerate(masses) if at not in recent), reverse=True)
    assert len(kept) == count and recent <= set(kept)
    assert sorted((masses[at] for at in kept if at not in recent), reverse=True) == others[: count - len(recent)]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=8).filter(any), st.integers(0, 32), st.integers(0, 9))
def test_tokens_are_forced_until_they_hold_the_share(weights, share, most) -> None:
    """The one by which it is reached is not: any of these, one token more, would reach it."""
    total, share = sum(weights), share / 32
    forced = defensivekv.forced_tokens(np.array([weights], float), share, most)[0]
    falling = sorted(weights, reverse=True)
    reached = next((count for count in range(len(weights)) if sum(falling[: count + 1]) / total >= share), 0)
    assert forced.sum() == min(reached, most)
    assert sorted(np.array(weights)[forced], reverse=True) == falling[: forced.sum()]


def test_tova_asks_the_last_query(attention) -> None:
    found = tova.scores(attention, KV_HEADS)
    assert (found[0] == found[1]).all() and found[0].argmax() == TOKENS - 1
    np.testing.assert_allclose(found[0, :-1], [np.mean(attention[:, -1, t]) for t in range(TOKENS - 1)])


def test_snapkv_pools_its_window(attention) -> None:
    window, before = 8, TOKENS - 8
    found = snapkv.scores(attention, KV_HEADS, window=window)
    for head, token in itertools.product(range(KV_HEADS), range(before)):
        near = [t for t in range(token - 2, token + 3) if 0 <= t < before]
        want = np.mean([np.mean(attention[h, -window:, t]) for h in group(head) for t in near]) * len(near) / 5
        np.testing.assert_allclose(found[head, token], want)
    assert found[:, before:].min() > found[:, :before].max()


@pytest.mark.parametrize("most", [14, TOKENS])  # what is forced ends by their number, or by their share
def test_defensivekv_takes_the_worst_case(attention, most) -> None:
    window, before = 8, TOKENS - 8
    rng = np.random.default_rng(4)
    values, projection = rng.standard_normal((KV_HEADS, TOKENS, 5)), rng.standard_normal((HEADS, 5, 7))
    norms = defensivekv.projected_norms(values, projection)
    found = defensivekv.scores(attention, norms, KV_HEADS, most, window=window)
    scores, forced = np.zeros((KV_HEADS, before)), np.zeros((KV_HEADS, before), bool)
    for head in range(KV_HEADS):
        worst = np.zeros(before)
        for h, q in itertools.product(group(head), range(QUERIES - window, QUERIES)):
            own = attention[h, q, :before]
            smooth = np.array([sum(own[max(0, t - 2) : t + 3]) / 5 for t in range(before)])
            worst = np.maximum(worst, smooth / smooth.sum() * own.sum())
        worst = np.maximum(worst, worst.mean())
        own_norms = [np.mean([np.abs(values[head, t] @ projection[h]).sum() for h in group(head)])
                     for t in range(TOKENS)]  # fmt: skip
        np.testing.assert_allclose(norms[head], own_norms)
        scores[head] = worst * own_norms[:before] / np.sum(own_norms[:before])
        mean = np.mean([attention[h, q, :before] for h in group(head) for q in range(QUERIES - window, QUERIES)], axis=0)
        near = np.mean([attention[h, q, before - window : before].sum()
                        for h in range(HEADS) for q in range(QUERIES - window, QUERIES)])  # fmt: skip
        order, held = np.argsort(-mean), 0.0
        for token in order[: most - window]:
            held += mean[token] / mean.sum()
            if held >= 0.9 - near:
                break
            forced[head, token] = True
    scores[forced] = scores.max()
    np.testing.assert_allclose(found[:, :before], scores)
    assert (found[:, before:] == found[:, :before].max()).all()


def test_twilight_reads_fewer_where_one_page_has_it_all() -> None:
    sharp, flat = np.full((2, 20), -9.0), np.zeros((2, 20))
    sharp[:, 7] = 9.0
    candidates, pins = np.arange(0, 20, 2), Pins(1, 1)
    assert twilight.places(flat, candidates, pins, 20, share=0.75).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 19]
    sharp[:, 8] = 9.5
    assert twilight.places(sharp, candidates, pins, 20, share=0.75).tolist() == [0, 8, 19]


def test_kascade_chooses_anchors_and_heads() -> None:
    rng = np.random.default_rng(5)
    similarity = np.triu(rng.random((7, 7)))
    best, chosen = max(
        (sum(similarity[max(a for a in anchors if a <= layer), layer] for layer in range(7)), anchors)
        for anchors in ((0, *rest) for rest in itertools.combinations(range(1, 7), 2))
    )  # fmt: skip
    found = kascade.anchors(similarity, 3)
    assert tuple(found) == chosen and best > 0
    weights, anchor = rng.random((2, 9)), rng.random((3, 9))
    got = kascade.overlap(weights, anchor, 4)
    for head, other in itertools.product(range(2), range(3)):
        top, own = np.argsort(-anchor[other])[:4], np.sort(weights[head])[-4:]
        np.testing.assert_allclose(got[head, other], weights[head, top].sum() / own.sum())
    assert (kascade.head_map(got) == got.argmax(axis=1)).all()
    assert kascade.budget(16).pages(40) == 8 and kascade.budget(16).pages(2048) == 205


def test_sentencekv_takes_whole_sentences() -> None:
    keys, begins = np.repeat(np.eye(4), [5, 9, 4, 2], axis=0), np.array([0, 5, 14, 18])
    means = sentencekv.sentence_keys(keys, begins)
    assert (means == np.eye(4)).all()
    q = np.array([[3.0, 9.0, 1.0, 2.0], [3.0, 0.0, 1.0, 2.0]])  # the second sentence, then the first, the last, the third
    assert sentencekv.places(q, means, begins, 20, 12, 4).tolist() == [1, 2, 3, 4]  # 9 tokens, the first does not fit, 2
    assert sentencekv.places(q, means, begins, 20, 14, 4).tolist() == [0, 1, 2, 3]


def test_louiskv_waits_for_a_turn() -> None:
    q = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert not louiskv.turned(q, q * 3) and louiskv.turned(q, q[::-1])
    assert not louiskv.turned(q, q, 1.0)  # as near as it must be
    keys = np.array([[1, 0], [2, 0.1], [0, 1], [0.1, 1], [1, 0]], float)
    assert louiskv.segments(keys, 0.8).tolist() == [0, 2, 4]
    scores = louiskv.unit_scores(q, np.eye(2), 1.0)
    want = [np.exp(row) / np.exp(row).sum() for row in q @ np.eye(2)]
    np.testing.assert_allclose(scores, np.mean(want, axis=0))
    units = np.repeat([0, 1, 2], [4, 6, 2])
    assert louiskv.places(np.array([0.1, 0.7, 0.2]), units, 8, 2).tolist() == [2, 3, 4, 5]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-9, 9)), min_size=1, max_size=9),
       st.sampled_from([0.3, 0.83, 0.97]))  # fmt: skip
def test_louiskvs_segments_are_of_keys_like_their_mean(keys, similarity) -> None:
    """Each key against the mean of all of its segment before it."""
    begins, own = [], []
    for at, key in enumerate(np.array(keys, float)):
        if own:
            mean = np.mean(own, axis=0)
            cosine = key @ mean / (np.linalg.norm(key) * np.linalg.norm(mean))
            assume(abs(cosine - similarity) > 1e-9)
        if not own or cosine < similarity:
            begins, own = [*begins, at], []
        own.append(key)
    assert louiskv.segments(np.array(keys, float), similarity).tolist() == begins


def test_epicache_has_a_list_for_each_episode(attention) -> None:
    rng = np.random.default_rng(6)
    turns = np.concatenate([np.array([[10.0, 0]]) + rng.standard_normal((5, 2)) / 9,
                            np.array([[0, 10.0]]) + rng.standard_normal((4, 2)) / 9])
    labels, medoids = epicache.episodes(turns, 2)
    assert len(set(labels[:5])) == len(set(labels[5:])) == 1 and labels[0] != labels[8]
    assert labels[medoids].tolist() == [0, 1]
    assert epicache.nearest(np.array([1.0, 9.0]), turns[medoids]) == labels[8]
    found = epicache.scores(attention, KV_HEADS)
    for head, token in itertools.product(range(KV_HEADS), range(TOKENS)):
        assert found[head, token] == max(attention[h, q, token] for h in group(head) for q in range(QUERIES))
    budgets = epicache.layer_budgets(np.array([0.9, 0.5, 0.99]), 90, 60)
    drift = np.array([0.1, 0.5, 0.01]) ** epicache.ALPHA
    assert budgets.sum() == 90 and budgets.max() <= 60 and (np.argsort(budgets) == np.argsort(drift)).all()
