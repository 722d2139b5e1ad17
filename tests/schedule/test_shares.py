"""pkvsim.schedule.shares: every page of a row is one rank's, and lengths follow from the rule alone."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.schedule.shares import MAX_RANKS, PageShares, RankShare, in_proportion, in_runs, interleaved

pages_of_rank = st.lists(st.integers(0, 9), min_size=1, max_size=MAX_RANKS).filter(any).map(tuple)


@given(pages_of_rank, st.integers(1, 40), st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_tokens_lie_where_their_pages_do(dealt, page_size, lens) -> None:
    shares, row_pages = PageShares(page_size, dealt), 3000 // page_size + 1
    rank, place = shares.place(np.arange(row_pages))
    for r in range(shares.num_ranks):
        own = np.flatnonzero(rank == r)
        assert (place[own] == np.arange(len(own))).all()  # in the row's order, without gaps
        assert shares.local_pages(row_pages, r) == len(own)
        for length, local in zip(lens, shares.local_lens(lens, r)):
            tokens = np.arange(length) // page_size
            assert local == (rank[tokens] == r).sum()
    assert sum(shares.local_lens(lens, r) for r in range(shares.num_ranks)).tolist() == lens


@given(st.integers(1, MAX_RANKS), st.integers(1, 64), st.integers(0, 10**6))
def test_interleaved_pages_cost_every_rank_the_same(num_ranks, page_size, length) -> None:
    local = [interleaved(num_ranks, page_size).local_lens([length], r)[0] for r in range(num_ranks)]
    assert max(local) - min(local) <= page_size and max(local) <= -(-length // num_ranks) + page_size


@given(st.integers(1, MAX_RANKS), st.integers(1, 64), st.integers(1, 10**5))
def test_runs_are_one_for_each_rank(num_ranks, page_size, most) -> None:
    shares = in_runs(num_ranks, page_size, max_tokens=most)
    rank, _ = shares.place(np.arange(-(-most // page_size)))
    assert (np.diff(rank) >= 0).all() and rank.max() < num_ranks


@given(st.lists(st.floats(0, 100), min_size=1, max_size=MAX_RANKS).filter(lambda w: sum(w) > 1e-3), st.integers(1, 200))
def test_shares_are_in_proportion_to_a_page(weights, cycle) -> None:
    dealt = in_proportion(weights, 16, cycle_pages=cycle).pages_of_rank
    assert sum(dealt) == cycle
    short = [weight / sum(weights) * cycle - pages for pages, weight in zip(dealt, weights)]
    assert all(abs(own) < 1 + 1e-6 for own in short)
    assert max(short) - min(short) < 1 + 1e-6  # whoever was rounded up had no smaller a remainder


@pytest.mark.parametrize(("make", "name"), [
    (lambda: PageShares(16, ()), "pages_of_rank"), (lambda: PageShares(16, (1,) * 9), "pages_of_rank"),
    (lambda: PageShares(16, (0, 0)), "pages_of_rank"), (lambda: PageShares(16, (1, -1)), r"pages_of_rank\[1\]"),
    (lambda: PageShares(0, (1,)), "page_size"), (lambda: interleaved(9, 16), "num_ranks"),
    (lambda: interleaved(2, 16, pages=0), "pages"), (lambda: in_runs(2, 16, max_tokens=0), "max_tokens"),
    (lambda: in_proportion((), 16), "weights"), (lambda: in_proportion((1, float("nan")), 16), "weights"),
    (lambda: in_proportion((0, 0), 16), "weights"), (lambda: in_proportion("fast", 16), "weights"),
    (lambda: in_proportion(((1, 2), (3,)), 16), "weights"), (lambda: in_proportion((1e308, 1e308), 16), "weights"),
    (lambda: in_runs(2, 0, max_tokens=9), "page_size"), (lambda: PageShares(16, 2), "pages_of_rank"),
    (lambda: in_proportion(("much",), 16), "weights"), (lambda: interleaved(2, 16).of_rank(2), "rank"),
    (lambda: interleaved(2, 16).local_lens([3], -1), "rank"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(make, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make()


def test_shares_of_lists_and_numpy_integers_are_the_same() -> None:
    assert PageShares(16, list(np.array([7, 3]))) == PageShares(16, (7, 3))
    assert hash(PageShares(16, [7, 3])) == hash(PageShares(16, (7, 3)))


@given(st.integers(2, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_the_kernel_divides_by_multiplying(cycle, lens) -> None:
    _, _, _, magic, shift = RankShare(0, 1, cycle).numbers()
    assert -(2**31) <= magic < 2**31 and 0 <= shift < 32
    edges = [edge for k in (1, 2, (2**31 - 1) // cycle) for edge in (k * cycle - 1, k * cycle) if edge < 2**31]
    for length in (*lens, *edges, 2**31 - 1):
        assert (length * (magic % 2**32)) >> 32 >> shift == length // cycle
