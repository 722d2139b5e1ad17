"""Attention over lists of pages: by one function, by the schedule of the lists, and by masking what is not listed."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim import AttentionOptions, DecodeShape, PageList, list_schedule, reference
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.page_lists import check_lists, list_shape, list_tokens


def random_lists(rng, shape: DecodeShape, lens: np.ndarray, most: int) -> PageList:
    """Ascending places, garbage behind them, and counts of which some are 0 and some too large for their rows."""
    pages = rng.integers(-5, 2**31 - 1, (len(lens), shape.num_kv_heads, most)).astype(np.int32)
    counts = np.zeros(pages.shape[:2], np.int32)
    for row, length in enumerate(lens):
        there = -(-int(length) // shape.page_size)
        for head in range(shape.num_kv_heads):
            count = int(rng.integers(0, min(most, there) + 1))
            pages[row, head, :count] = np.sort(rng.choice(there, count, replace=False))
            counts[row, head] = count if count < there else count + 3
    return PageList(pages, counts)


def make(seed: int, page_size: int, query_tokens: int = 1):
    rng = np.random.default_rng(seed)
    shape = DecodeShape(4, 2, 8, page_size)
    lens = rng.integers(0, 90, 4).astype(np.int32)
    lens[lens < query_tokens] = 0
    most = int(rng.integers(1, 1 + max(1, -(-int(lens.max()) // page_size))))
    pages = -(-lens // page_size)
    table = rng.permutation(4 * max(1, int(pages.max()))).astype(np.int32).reshape(4, -1)
    k, v = (rng.standard_normal((table.size, 2, page_size, 8)) for _ in range(2))
    tokens = () if query_tokens == 1 else (query_tokens,)
    q = rng.standard_normal((4, *tokens, 4, 8))
    return rng, shape, (q, k, v, table, lens), random_lists(rng, shape, lens, most)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 16, 32]), st.integers(1, 12))
def test_the_schedule_of_the_lists_computes_it(seed, page_size, ctas) -> None:
    rng, shape, step, lists = make(seed, page_size)
    out, lse = reference.selected_attention(shape, *step, lists)
    schedule = list_schedule(lists, shape, step[4], num_ctas=ctas, costs=BalancedCosts(2, 3))
    folded = reference.fold_lists(shape, *step[1:], lists)
    tokens = list_tokens(lists, shape, step[4])
    assert (schedule.tasks["tile_end"] - schedule.tasks["tile_begin"]).sum() == (-(-tokens // 16)).sum()
    got = reference.run_schedule(schedule, list_shape(shape), step[0].reshape(8, 2, 8), *folded)
    np.testing.assert_allclose(got[0].reshape(out.shape), out, atol=1e-12)
    np.testing.assert_allclose(got[1].reshape(lse.shape), lse, atol=1e-12)
    assert (folded[3].reshape(4, 2) == list_tokens(lists, shape, step[4])).all()


@pytest.mark.parametrize("query_tokens", [1, 3])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_lists_of_all_pages_are_dense(page_size, query_tokens) -> None:
    _, shape, step, _ = make(3, page_size, query_tokens)
    most = step[3].shape[1]
    lists = PageList(np.tile(np.arange(most), (4, 2, 1)), np.full((4, 2), most))
    options = AttentionOptions(query_tokens=query_tokens, sinks=True, soft_cap=3.0)
    sinks = np.arange(4.0)
    got = reference.selected_attention(shape, *step, lists, options=options, sinks=sinks)
    want = reference.attention(shape, *step, options=options, sinks=sinks)
    for mine, theirs in zip(got, want):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_what_is_not_listed_is_as_if_its_logits_were_minus_infinity() -> None:
    _, shape, (q, k, v, table, lens), lists = make(5, 4, query_tokens=2)
    options = AttentionOptions(query_tokens=2)
    out, lse = reference.selected_attention(shape, q, k, v, table, lens, lists, options=options)
    pages, counts = check_lists(lists, shape, lens)
    for row, length in enumerate(lens):
        for head in range(4):
            at = np.arange(length)
            listed = np.isin(at // 4, pages[row, head // 2, : counts[row, head // 2]])
            for token in range(2):
                seen = listed & (at < length - 1 + token)
                keys, values = (x[table[row, at // 4], head // 2, at % 4] for x in (k, v))
                logits = np.where(seen, keys @ q[row, token, head] * 8**-0.5, -np.inf)
                want = np.logaddexp.reduce(logits) if length else -np.inf
                np.testing.assert_allclose(lse[row, token, head], want)
                weights = np.exp(logits - want) if seen.any() else np.zeros(length)
                np.testing.assert_allclose(out[row, token, head], weights @ values, atol=1e-12)


def test_pages_masses_add_up() -> None:
    _, shape, step, _ = make(7, 16)
    for tokens in (16, 8):
        mass = np.exp(reference.page_lse(shape, step[0], step[1], *step[3:], tokens=tokens)
                      - reference.attention(shape, *step)[1].reshape(4, 2, 1, 2))  # fmt: skip
        np.testing.assert_allclose(np.nan_to_num(mass).sum(axis=2)[step[4] > 0], 1.0)


def test_pages_masses_are_those_of_any_options() -> None:
    """Of a sink and of V's width a page's logits know nothing."""
    _, shape, step, _ = make(7, 16)
    want = reference.page_lse(shape, step[0], step[1], *step[3:])
    options = AttentionOptions(sinks=True, v_head_dim=64)
    assert (reference.page_lse(shape, step[0], step[1], *step[3:], options=options) == want).all()
    with pytest.raises(ValueError, match="^tokens: expected"):
        reference.page_lse(shape, step[0], step[1], *step[3:], tokens=0)


@pytest.mark.parametrize(("pages", "counts", "match"), [
    (np.zeros((1, 2, 3), np.int32), [[1, 4]], r"pages\[0, 1, 1\].*above the one before"),
    ([[[0, 1, 9]] * 2], [[3, 1]], r"pages\[0, 0, 2\].*below the row's 3 pages, got 9"),
    (np.zeros((2, 2, 3), np.int32), [[1, 1]], "pages: expected integers"),
    (np.zeros((1, 2, 3), np.int32), [1, 1], "counts: expected integers"),
])
def test_lists_that_are_none_are_named(pages, counts, match) -> None:
    with pytest.raises(ValueError, match=match):
        check_lists(PageList(np.asarray(pages), np.asarray(counts)), DecodeShape(2, 2, 8, 4), [9])
