"""What is kept of a page's keys, so that the page can be scored without being read."""
from __future__ import annotations

import numpy as np

from pkvsim.selection import centroids
from pkvsim.selection.centroids import CENTROIDS, Centroids

MEAN_STD, MIN_MAX = "mean_std", "min_max"
SUMMARIES = (MEAN_STD, MIN_MAX, CENTROIDS)
CODES = "uint8"  # the dtype of summaries that are kept in 8-bit codes
# Of each kind's two vectors: the code of 0, the steps that its largest magnitude is divided into, and how elements are
# rounded to steps. Minima and maxima go outward, so that they stay bounds, for which half a step of 127 is left.
_CODING = {MEAN_STD: ((128, 127.0, np.rint), (0, 255.0, np.rint)),
           MIN_MAX: ((128, 126.5, np.floor), (128, 126.5, np.ceil))}


def summarize(keys: np.ndarray, kind: str) -> np.ndarray:
    """The summary of a page's keys [tokens, head_dim], float64 [2, head_dim]: their mean and standard deviation (of the
    tokens, not a sample's), or minimum and maximum, element by element. Raises ValueError naming kind."""
    keys = np.asarray(keys, np.float64)
    if kind == MEAN_STD:
        return np.stack((keys.mean(axis=0), keys.std(axis=0)))
    if kind == MIN_MAX:
        return np.stack((keys.min(axis=0), keys.max(axis=0)))
    raise ValueError(f"kind: expected one of {MEAN_STD}, {MIN_MAX}, got {kind!r}")


def check_form(kind: str, summary_dtype: str | None) -> None:
    """Raises ValueError naming summary_dtype where summaries of a kind are not kept so."""
    if summary_dtype not in (None, CODES):
        raise ValueError(f"summary_dtype: expected None or {CODES!r}, got {summary_dtype!r}")
    if kind == CENTROIDS and summary_dtype is not None:
        raise ValueError(f"summary_dtype: expected None of centroids, which are 4-bit codes, got {summary_dtype!r}")


def as_kept(keys: np.ndarray, page_size: int, kind: str, summary_dtype: str | None) -> np.ndarray | Centroids:
    """What a method scores of a row's pages, of keys [tokens, head_dim]: where codes are kept, what they stand for."""
    if kind == CENTROIDS:
        return centroids.decode(centroids.encode(centroids.row_centroids(keys, page_size)))
    found = row_summaries(keys, page_size, kind)
    return found if summary_dtype is None else decode(*encode(found, kind), kind)


def row_summaries(
    keys: np.ndarray, page_size: int, kind: str
) -> np.ndarray:  # fmt: skip
    """Summaries of a row's pages, float64 [pages, 2, head_dim], of its keys [tokens, head_dim]; the last page's is of
    the tokens that are there."""
    pages = [summarize(keys[at : at + page_size], kind) for at in range(0, len(keys), page_size)]
    return np.array(pages).reshape(len(pages), 2, keys.shape[-1])


def encode(summaries: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Summaries [..., 2, head_dim] in 8 bits: (codes [..., 2, head_dim] uint8, scales [..., 2] float64).

    Each vector has a scale of its own, so many parts of its largest magnitude. An element is off by half a scale at
    most, or, of minima and maxima, by less than a scale, to the side where the bound holds.
    """
    summaries = np.asarray(summaries, np.float64)
    codes, scales = np.empty(summaries.shape, np.uint8), np.abs(summaries).max(axis=-1)
    for i, (zero, steps, rounded) in enumerate(_CODING[kind]):
        scales[..., i] /= steps
        scale = scales[..., i, None]
        at = np.divide(summaries[..., i, :], scale, out=np.zeros_like(summaries[..., i, :]), where=scale > 0)
        codes[..., i, :] = np.clip(rounded(at) + zero, 0, 255)
    return codes, scales


def decode(codes: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """What codes [..., 2, head_dim] and scales [..., 2] stand for: float64 [..., 2, head_dim]."""
    zeros = np.array([zero for zero, *_ in _CODING[kind]], np.float64)
    return (np.asarray(codes, np.float64) - zeros[:, None]) * np.asarray(scales, np.float64)[..., None]
