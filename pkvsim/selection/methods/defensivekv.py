"""DefensiveKV and Layer-DefensiveKV (Feng et al., ICLR 2026, arXiv 2510.13334): the worst case instead of the mean.

Weights of the window's queries on the tokens before it, pooled over 5 tokens such that each query's sum stays; then the
largest over the group and over the queries (what some query might need once), no smaller than the mean over the tokens
(what no query has needed yet). As in CriticalKV (arXiv 2502.03805) this is multiplied by the L1 norm of the value as
the output projection leaves it, averaged over the group and normalised over the tokens; and tokens that hold 90 % of
the mean attention are forced, or less of it by what the tokens just before the window hold, as the authors' code has
it (github.com/FFY0/DefensiveKV). Top k over the layer's heads together, or over all layers' (pkvsim.selection.budgets).
Evicts once, after prefill.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.masses import group_max, group_mean, pooled

WINDOW, POOL, FORCED_SHARE = 32, 5, 0.9


def scores(attention: np.ndarray, value_norms: np.ndarray, num_kv_heads: int, most: int, *, window: int = WINDOW,
           pool: int = POOL) -> np.ndarray:
    """Of tokens, [num_kv_heads, tokens]; forced ones and the window share the largest score.

    value_norms [num_kv_heads, tokens]: see projected_norms. most: tokens that a head keeps on average, which bounds
    what is forced.
    """
    seen = attention[:, -window:, :-window]
    smooth = pooled(seen, pool)
    smooth = smooth / smooth.sum(axis=-1, keepdims=True) * seen.sum(axis=-1, keepdims=True)
    worst = group_max(smooth.max(axis=1), num_kv_heads)
    worst = np.maximum(worst, worst.mean(axis=-1, keepdims=True))
    norms = value_norms[:, :-window]
    worst = worst * (norms / norms.sum(axis=-1, keepdims=True))
    mean = group_mean(seen.mean(axis=1), num_kv_heads)
    near = float(seen[..., -window:].sum(axis=-1).mean())
    forced = forced_tokens(mean, FORCED_SHARE - near, most - window)
    worst = np.where(forced, worst.max(), worst)
    return np.pad(worst, ((0, 0), (0, window)), constant_values=worst.max(initial=0.0))


def forced_tokens(mean: np.ndarray, share: float, most: int) -> np.ndarray:
    """The fewest tokens before the sum of each head's mean attention [num_kv_heads, tokens] reaches `share` of it, no
    more than `most`: bool, alike."""
    forced = np.zeros(mean.shape, bool)
    for head, weights in enumerate(mean):
        order = np.argsort(-weights, kind="stable")
        count = int(np.argmax(np.cumsum(weights[order]) / weights.sum() >= share))
        forced[head, order[: max(0, min(count, most))]] = True
    return forced


def projected_norms(values: np.ndarray, output_projection: np.ndarray) -> np.ndarray:
    """L1 norms of values [num_kv_heads, tokens, head_dim] after each query head's part of the output projection
    [num_q_heads, head_dim, hidden], means over the group: [num_kv_heads, tokens]."""
    heads = len(values)
    weights = output_projection.reshape(heads, -1, *output_projection.shape[1:])
    return np.stack([np.abs(values[head] @ weights[head]).sum(axis=-1).mean(axis=0) for head in range(heads)])
