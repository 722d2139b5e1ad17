"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): heavy hitters, the tokens with the most attention in all.

A token's score is the sum of what every query gave it, so each step adds its own; half of the budget is for the
heaviest and half for the most recent. Evicts, as a greedy policy: what is gone is never scored again. Query heads that
share a KV head are averaged.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.masses import group_mean
from pkvsim.selection.rules import Pins, top_pages

RECENT_SHARE = 0.5


def scores(attention: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Of tokens, [num_kv_heads, tokens], after these queries."""
    return group_mean(attention.sum(axis=1), num_kv_heads)


def accumulate(total: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """The scores after one more step: of pages so far [num_kv_heads, pages], and what the step's query gave to these
    and the new ones [num_kv_heads, pages or more]."""
    grown = np.zeros_like(masses)
    grown[:, : total.shape[1]] = total
    return grown + masses


def places(total: np.ndarray, count: int) -> np.ndarray:
    """The pages that one head keeps of its scores [pages], ascending: half of them the last ones."""
    return top_pages(total, min(count, len(total)), Pins(0, int(count * RECENT_SHARE)))
