"""Summaries in 8-bit codes: how far an element is off, and that bounds stay bounds."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pkvsim.selection.by_name import select_pages
from pkvsim.selection.methods import mean_std, quest
from pkvsim.selection.summaries import CODES, MEAN_STD, MIN_MAX, decode, encode, row_summaries
from pkvsim.shapes import DecodeShape

MAGNITUDES = st.floats(-1e4, 1e4).map(lambda x: x if abs(x) > 1e-30 else 0.0)
KEYS = st.tuples(st.integers(1, 9), st.integers(1, 6)).flatmap(lambda sizes: arrays(np.float64, sizes, elements=MAGNITUDES))


@given(keys=KEYS, page_size=st.integers(1, 4))
def test_an_element_is_off_by_half_a_scale_or_less(keys, page_size) -> None:
    found = row_summaries(keys, page_size, MEAN_STD)
    codes, scales = encode(found, MEAN_STD)
    assert codes.dtype == np.uint8 and scales.shape == found.shape[:2]
    off = np.abs(decode(codes, scales, MEAN_STD) - found)
    largest = np.abs(found).max(axis=-1)
    assert (off <= 0.5 * scales[..., None] * (1 + 1e-9)).all()
    assert (off.max(axis=-1) <= largest * np.array([1 / 254, 1 / 510]) * (1 + 1e-9)).all()


@given(keys=KEYS, page_size=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_bounds_stay_bounds(keys, page_size, seed) -> None:
    """No key of a page has a logit above Quest's score of its codes, which is little above that of the bounds."""
    found = row_summaries(keys, page_size, MIN_MAX)
    codes, scales = encode(found, MIN_MAX)
    held = decode(codes, scales, MIN_MAX)
    slack = 1e-9 * scales[..., None]
    assert (held[:, 0] <= found[:, 0] + slack[:, 0]).all() and (held[:, 1] >= found[:, 1] - slack[:, 1]).all()
    assert (np.abs(held - found) <= scales[..., None] * (1 + 1e-9)).all()
    q = np.random.default_rng(seed).standard_normal((2, keys.shape[1]))
    bound, exact = quest.logits(q, held, 1.0), quest.logits(q, found, 1.0)
    reach = 1e-9 * np.abs(keys).max() * np.abs(q).sum() + 1e-30
    assert (exact <= bound + reach).all()
    assert (bound - exact <= np.abs(q).sum(axis=1)[:, None] * scales.max(axis=1) + reach).all()


@given(keys=KEYS, page_size=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_logits_of_codes_are_as_far_off_as_their_scales(keys, page_size, seed) -> None:
    found = row_summaries(keys, page_size, MEAN_STD)
    codes, scales = encode(found, MEAN_STD)
    q = np.random.default_rng(seed).standard_normal((2, keys.shape[1]))
    off = np.abs(mean_std.logits(q, decode(codes, scales, MEAN_STD), 1.0) - mean_std.logits(q, found, 1.0))
    # The norm of (q std) moves by no more than the norm of q times what each deviation is off.
    of_norms = mean_std.DEVIATIONS * np.linalg.norm(q, axis=1)
    allowed = 0.5 * (np.abs(q).sum(axis=1)[:, None] * scales[:, 0] + of_norms[:, None] * scales[:, 1])
    assert (off <= allowed + 1e-9 * np.abs(keys).max() * np.abs(q).sum() + 1e-30).all()


@pytest.mark.parametrize("method", ["mean_std", "quest"])
def test_nearly_the_same_pages_are_selected_by_codes(method) -> None:
    shape, rng = DecodeShape(4, 2, 64, 16), np.random.default_rng(0)
    keys = rng.standard_normal((200, 2, 1, 64)) + rng.exponential(1.0, (200, 2, 1, 64)) * rng.standard_normal(
        (200, 2, 16, 64))  # fmt: skip
    step = shape, rng.standard_normal((1, 4, 64)), keys, rng.permutation(200)[None], np.array([16 * 200 - 3])
    exact, coded = select_pages(method, *step), select_pages(method, *step, summary_dtype=CODES)
    assert (exact.counts == coded.counts).all()
    for head in range(2):
        assert len(np.setdiff1d(exact.pages[0, head], coded.pages[0, head])) <= 2
