"""Mean + std, the default: a page is scored by its mean logit plus one standard deviation.

Elements of a key are taken to vary on their own, so the variance of q . k over a page is the sum of (q_d std_d)^2.
Scores become weights by a softmax over the row's pages, which are averaged over the query heads of the group: heads with
one sharp page then count as much as heads with many equal ones. Scored by no paper that we know of; the best in a trial
on a real model against Quest's bound, whose pages of a wide spread crowd out the others.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import softmax_mean
from pkvsim.selection.summaries import MEAN_STD

SUMMARY = MEAN_STD
AGGREGATION = "softmax_mean"


def logits(q: np.ndarray, summaries: np.ndarray, scale: float) -> np.ndarray:
    """Of a group's queries [group_size, head_dim] and summaries [pages, 2, head_dim]: [group_size, pages]."""
    mean, std = summaries[:, 0], summaries[:, 1]
    return scale * (q @ mean.T + np.sqrt((q * q) @ (std * std).T))


def scores(q: np.ndarray, summaries: np.ndarray, scale: float) -> np.ndarray:
    """Of each page, [pages]."""
    return softmax_mean(logits(q, summaries, scale))
