"""A page's keys as eight centroids: its tokens in parts whose keys are alike, of each part the mean key and the count.

A mean and a deviation of a whole page cannot say which of its tokens has all elements of its key at once, so that a
token which stands alone in its page is lost among the others. Parts of keys that are alike keep such a token apart: it
becomes a part of its own. Parts by place in the page would not (examples/results/selection_study.md compares them).

A part is as much mass as its tokens would be if all had its mean key, which is how Squeezed Attention (arXiv
2411.09688) scores its clusters of a whole context. Parts are found by farthest-first traversal (Gonzalez 1985,
"Clustering to minimize the maximum intercluster distance"): the first seed is the page's first token, each next one
the token that is farthest from all seeds so far, and a token belongs to the seed nearest to it, of equal ones the
first. So no part has two tokens that are farther apart than twice what the best eight parts need.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

CENTROIDS = "centroids"  # the kind of summary
PARTS = 8  # of a page; cuda_src/centroid_scores.cuh has as many rows
ELEMENTS_PER_BYTE = 2
ZERO, LARGEST_CODE = 8, 15  # the code of 0; codes are of 4 bits
STEPS = 7.5  # that the largest magnitude of a centroid is divided into
NO_TOKENS = -60000.0  # in place of the log2 of the count of a part without tokens: finite in FP16, and less than all
LARGEST_SCALE = 65504.0  # FP16's


class Centroids(NamedTuple):
    """Of pages, or of one: float64."""

    means: np.ndarray  # [..., PARTS, head_dim], zeros of a part without tokens
    log2_counts: np.ndarray  # [..., PARTS], NO_TOKENS of a part without tokens


class CodedCentroids(NamedTuple):
    """As the GPU keeps them."""

    codes: np.ndarray  # [..., PARTS, head_dim / 2] uint8: of two neighbours the first is in the lower 4 bits
    scales: np.ndarray  # [..., PARTS, 2] float16: a step, and the log2 of the count


def split(keys: np.ndarray) -> np.ndarray:
    """The part of each token of a page's keys [tokens, head_dim], int64 [tokens]."""
    keys = np.asarray(keys, np.float64)
    nearest, parts, seed = np.full(len(keys), np.inf), np.zeros(len(keys), np.int64), 0
    for part in range(PARTS if len(keys) else 0):
        distance = np.square(keys - keys[seed]).sum(axis=1)
        parts[distance < nearest] = part
        nearest = np.minimum(nearest, distance)
        seed = int(nearest.argmax())
    return parts


def page_centroids(keys: np.ndarray) -> Centroids:
    """Of one page's keys [tokens, head_dim]."""
    keys = np.asarray(keys, np.float64)
    own = split(keys) == np.arange(PARTS)[:, None]
    counts = own.sum(axis=1)
    means = own @ keys / np.maximum(counts, 1)[:, None]
    return Centroids(means, np.where(counts > 0, np.log2(np.maximum(counts, 1)), NO_TOKENS))


def row_centroids(keys: np.ndarray, page_size: int) -> Centroids:
    """Of a row's pages, of its keys [tokens, head_dim]; the last page's are of the tokens that are there."""
    pages = [page_centroids(keys[at : at + page_size]) for at in range(0, len(keys), page_size)]
    means = np.array([page.means for page in pages]).reshape(len(pages), PARTS, keys.shape[-1])
    return Centroids(means, np.array([page.log2_counts for page in pages]).reshape(len(pages), PARTS))


def encode(centroids: Centroids) -> CodedCentroids:
    """Each mean in 4 bits with a scale of its own, that of its largest magnitude: elements are off by half a scale at
    most, but for rounding of the scale to FP16."""
    means = np.asarray(centroids.means, np.float64)
    largest = np.abs(means).max(axis=-1)
    scales = np.minimum(largest / STEPS, LARGEST_SCALE).astype(np.float16)
    step = scales.astype(np.float64)[..., None]
    at = np.divide(means, step, out=np.zeros_like(means), where=step > 0)
    codes = np.clip(np.rint(at) + ZERO, 0, LARGEST_CODE).astype(np.uint8)
    packed = codes[..., ::ELEMENTS_PER_BYTE] | codes[..., 1::ELEMENTS_PER_BYTE] << 4
    return CodedCentroids(packed, np.stack((scales, centroids.log2_counts.astype(np.float16)), axis=-1))


def decode(coded: CodedCentroids) -> Centroids:
    """What codes stand for."""
    codes = np.stack((coded.codes & 15, coded.codes >> 4), axis=-1).astype(np.float64)
    codes = codes.reshape(*coded.codes.shape[:-1], -1)
    scales = coded.scales.astype(np.float64)
    return Centroids((codes - ZERO) * scales[..., :1], scales[..., 1])
