"""Mean + std, the default: a page is scored by its mean logit plus three standard deviations.

Elements of a key are taken to vary on their own, so the variance of q . k over a page is the sum of (q_d std_d)^2.
What a page weighs is near its largest logit wherever that matters. Of 16 logits drawn from a normal distribution the
largest is 1.77 standard deviations above their mean in expectation, and one that stands out alone is
sqrt(15) = 3.87 above it: with one of n at m + D and the others at m, the mean is m + D / n and the deviation
D sqrt(n - 1) / n. Three lies between, and did best of one to four on a real model; half the variance, which the exact
mass of normal logits has in its place, leaves out more of the pages with one such token
(examples/results/selection_study.md, for pages of 16 tokens; the number is the same for other sizes).

Scores become weights by a softmax over the row's pages, and these are averaged over the query heads of the group: a
head with one sharp page then counts as much as one with many equal pages. No paper that we know of scores so.
examples/study_selection.py compares it with Quest's bound on a real model.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import softmax_mean
from pkvsim.selection.summaries import MEAN_STD

SUMMARY = MEAN_STD
AGGREGATION = "softmax_mean"
DEVIATIONS = 3  # above the mean logit; select.cu is compiled with it


def logits(q: np.ndarray, summaries: np.ndarray, scale: float) -> np.ndarray:
    """Of a group's queries [group_size, head_dim] and summaries [pages, 2, head_dim]: [group_size, pages]."""
    mean, std = summaries[:, 0], summaries[:, 1]
    return scale * (q @ mean.T + DEVIATIONS * np.sqrt((q * q) @ (std * std).T))


def scores(q: np.ndarray, summaries: np.ndarray, scale: float) -> np.ndarray:
    """Of each page, [pages]."""
    return softmax_mean(logits(q, summaries, scale))
