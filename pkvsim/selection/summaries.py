"""What is kept of a page's keys, so that the page can be scored without being read."""
from __future__ import annotations

import numpy as np

MEAN_STD, MIN_MAX = "mean_std", "min_max"
SUMMARIES = (MEAN_STD, MIN_MAX)


def summarize(keys: np.ndarray, kind: str) -> np.ndarray:
    """The summary of a page's keys [tokens, head_dim], float64 [2, head_dim]: their mean and standard deviation (of the
    tokens, not a sample's), or minimum and maximum, element by element. Raises ValueError naming kind."""
    keys = np.asarray(keys, np.float64)
    if kind == MEAN_STD:
        return np.stack((keys.mean(axis=0), keys.std(axis=0)))
    if kind == MIN_MAX:
        return np.stack((keys.min(axis=0), keys.max(axis=0)))
    raise ValueError(f"kind: expected one of {', '.join(SUMMARIES)}, got {kind!r}")


def row_summaries(
    keys: np.ndarray, page_size: int, kind: str
) -> np.ndarray:  # fmt: skip
    """Summaries of a row's pages, float64 [pages, 2, head_dim], of its keys [tokens, head_dim]; the last page's is of
    the tokens that are there."""
    pages = [summarize(keys[at : at + page_size], kind) for at in range(0, len(keys), page_size)]
    return np.array(pages).reshape(len(pages), 2, keys.shape[-1])
