"""Centroids of a page's keys against a plain statement, and what splitting by likeness promises."""
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pkvsim.selection.by_name import select_pages
from pkvsim.selection.centroids import (
    NO_TOKENS,
    PARTS,
    Centroids,
    decode,
    encode,
    page_centroids,
    row_centroids,
    split,
)
from pkvsim.selection.methods import centroids
from pkvsim.selection.summaries import as_kept, check_form
from pkvsim.shapes import DecodeShape

# Few distinct numbers make equal keys and equal distances; all are exact in float64.
KEYS = st.tuples(st.integers(1, 20), st.integers(1, 3).map(lambda n: 2 * n)).flatmap(
    lambda sizes: arrays(np.float64, sizes, elements=st.integers(-4, 4) | st.integers(-3000, 3000)))


def plain_split(keys: list[list[float]]) -> list[int]:
    def apart(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b))

    seeds = [0]
    while len(seeds) < PARTS:
        reach = [min(apart(key, keys[seed]) for seed in seeds) for key in keys]
        seeds.append(reach.index(max(reach)))
    of_token = []
    for key in keys:
        distances = [apart(key, keys[seed]) for seed in seeds]
        of_token.append(distances.index(min(distances)))
    return of_token


@given(keys=KEYS)
def test_parts_are_found_by_farthest_first_traversal(keys) -> None:
    assert split(keys).tolist() == plain_split(keys.tolist())


@given(keys=KEYS)
def test_centroids_are_the_means_of_parts_and_tell_every_token(keys) -> None:
    of_token = plain_split(keys.tolist())
    found = page_centroids(keys)
    counts = np.where(found.log2_counts > NO_TOKENS, 2**found.log2_counts, 0)
    assert counts.sum() == pytest.approx(len(keys))
    for part in range(PARTS):
        own = [key for key, other in zip(keys, of_token) if other == part]
        assert counts[part] == pytest.approx(len(own))
        np.testing.assert_allclose(found.means[part], np.mean(own, axis=0) if own else 0, atol=1e-9)


@given(keys=KEYS)
def test_no_more_distinct_keys_than_parts_are_kept_as_they_are(keys) -> None:
    distinct = np.unique(keys, axis=0)[:PARTS]
    page = distinct[np.arange(16) % len(distinct)]
    q = np.random.default_rng(0).standard_normal((2, keys.shape[1]))
    found = centroids.logits(q, Centroids(*(x[None] for x in page_centroids(page))), 0.01)[:, 0]
    np.testing.assert_allclose(found, np.logaddexp.reduce(0.01 * q @ page.T, axis=1), rtol=1e-9, atol=1e-9)


@given(keys=KEYS)
def test_codes_are_off_by_half_a_step_or_less(keys) -> None:
    found = row_centroids(keys, 7)
    coded = encode(found)
    assert coded.codes.dtype == np.uint8 and coded.codes.shape == (*found.means.shape[:2], keys.shape[1] // 2)
    held = decode(coded)
    step = coded.scales[..., :1].astype(np.float64)
    # The scale is rounded to FP16, by which the largest element may be off beside its half step.
    allowed = 0.5 * step + 8 * 2.0**-11 * step + np.where(step < 1e-3, 1e-3, 0)
    assert (np.abs(held.means - found.means) <= allowed + 1e-12).all()
    np.testing.assert_allclose(held.log2_counts, found.log2_counts, rtol=2.0**-11)
    assert all((x == y).all() for x, y in zip(as_kept(keys, 7, "centroids", None), held))


def test_scores_are_of_the_mass_of_the_parts() -> None:
    rng = np.random.default_rng(1)
    keys, q = rng.standard_normal((45, 6)), rng.standard_normal((3, 6))
    logits = np.zeros((3, 3))
    for head in range(3):
        for page in range(3):
            own = keys[16 * page : 16 * page + 16]
            of_token = plain_split(own.tolist())
            for part in set(of_token):
                mine = [key for key, other in zip(own, of_token) if other == part]
                logits[head, page] += len(mine) * math.exp(0.5 * float(q[head] @ np.mean(mine, axis=0)))
    found = row_centroids(keys, 16)
    np.testing.assert_allclose(centroids.logits(q, found, 0.5), np.log(logits))
    np.testing.assert_allclose(centroids.scores(q, found, 0.5), (logits / logits.sum(1, keepdims=True)).mean(0))


def test_a_token_that_stands_alone_is_found() -> None:
    """Mean and deviation rank its page behind pages whose keys merely vary."""
    rng, shape = np.random.default_rng(2), DecodeShape(1, 1, 64, 16)
    keys = rng.standard_normal((100, 1, 16, 64)) * rng.exponential(1.0, (100, 1, 1, 64))
    q = rng.standard_normal((1, 1, 64))
    keys[40, 0] = 0.05 * rng.standard_normal((16, 64))
    keys[40, 0, 7] = 0.8 * q[0, 0]
    step = shape, q, keys, np.arange(100)[None], np.array([1600])
    assert 40 in select_pages("centroids", *step).pages and 40 not in select_pages("mean_std", *step).pages


def test_they_have_one_form() -> None:
    with pytest.raises(ValueError, match="summary_dtype: expected None of centroids"):
        check_form("centroids", "uint8")
