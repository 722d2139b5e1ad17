"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): what the last queries of the prompt looked at, with its
neighbours.

Mean over the window's queries of their weights on the tokens before it, pooled over 5 tokens, mean over the group. The
window is always kept. Evicts once, after prefill.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.masses import group_mean, pooled

WINDOW, POOL = 32, 5  # queries, tokens


def scores(attention: np.ndarray, num_kv_heads: int, *, window: int = WINDOW, pool: int = POOL) -> np.ndarray:
    """Of tokens, [num_kv_heads, tokens]; those of the window score above all others."""
    before = group_mean(pooled(attention[:, -window:, :-window].mean(axis=1), pool), num_kv_heads)
    return np.pad(before, ((0, 0), (0, window)), constant_values=before.max(initial=0.0) + 1)
