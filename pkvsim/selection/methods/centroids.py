"""Centroids: a page is scored by the mass that its parts would have if each were so many times its mean key.

pkvsim.selection.centroids says what parts are. With eight parts of 4 bits an element they take as many bytes as mean
and deviation in 16 bits, and find tokens that stand alone in their pages, which these miss: examples/study_selection.py
compares them on a real model, and examples/results/selection_study.md has the figures. They serve pages of 16 tokens
best; of larger pages a part has more tokens.

The score of a part is that of Squeezed Attention (arXiv 2411.09688), which clusters the keys of a whole context. Scores
become weights as mean + std's do: softmax over the row's pages, averaged over the query heads of the group.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.centroids import CENTROIDS, Centroids
from pkvsim.selection.rules import softmax_mean

SUMMARY = CENTROIDS
AGGREGATION = "softmax_mean"


def logits(q: np.ndarray, centroids: Centroids, scale: float) -> np.ndarray:
    """The log of each page's mass, of a group's queries [group_size, head_dim] and pages' centroids: [group_size,
    pages]."""
    means, counts = centroids
    of_parts = scale * np.einsum("gd,pcd->gpc", q, means) + np.log(2) * counts
    return np.logaddexp.reduce(of_parts, axis=-1)


def scores(q: np.ndarray, centroids: Centroids, scale: float) -> np.ndarray:
    """Of each page, [pages]."""
    return softmax_mean(logits(q, centroids, scale))
