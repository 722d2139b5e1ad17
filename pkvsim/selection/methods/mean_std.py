"""Mean + std, the default: a page is scored by its mean logit plus one standard deviation.

Elements of a key are taken to vary on their own, so the variance of q . k over a page is the sum of (q_d std_d)^2.
Scores become weights by a softmax over the row's pages, and these are averaged over the query heads of the group: a
head with one sharp page then counts as much as one with many equal pages. No paper that we know of scores so.
examples/study_selection.py compares it with Quest's bound on a real model, and with other multiples of the deviation;
examples/results/selection_study.md has a first look.
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
