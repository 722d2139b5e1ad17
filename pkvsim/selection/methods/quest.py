"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): an upper bound of a page's logits, from its keys' extremes.

score = sum over d of max(q_d min_d, q_d max_d); top k pages at every step, the first two layers dense. The paper has a
KV head for each query head; where query heads share one, a page counts as the head that wants it most says.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.summaries import MIN_MAX

SUMMARY = MIN_MAX
AGGREGATION = "maximum"
DENSE_LAYERS = 2


def logits(q: np.ndarray, summaries: np.ndarray, scale: float) -> np.ndarray:
    """Of a group's queries [group_size, head_dim] and summaries [pages, 2, head_dim]: [group_size, pages]."""
    low, high = summaries[:, 0], summaries[:, 1]
    return scale * (np.minimum(q, 0) @ low.T + np.maximum(q, 0) @ high.T)


def scores(q: np.ndarray, summaries: np.ndarray, scale: float) -> np.ndarray:
    """Of each page, [pages]."""
    return logits(q, summaries, scale).max(axis=0)
