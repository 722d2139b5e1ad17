"""From the attention that tokens got to scores of pages."""
from __future__ import annotations

import numpy as np


def group_mean(x: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Means over the query heads that share a KV head: [num_q_heads, ...] to [num_kv_heads, ...]."""
    return x.reshape(num_kv_heads, -1, *x.shape[1:]).mean(axis=1)


def group_max(x: np.ndarray, num_kv_heads: int) -> np.ndarray:
    return x.reshape(num_kv_heads, -1, *x.shape[1:]).max(axis=1)


def pooled(x: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` neighbours (odd) along the last axis, 0 beyond its ends."""
    half = width // 2
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)])
    total = padded[..., : x.shape[-1]].copy()
    for at in range(1, width):
        total += padded[..., at : at + x.shape[-1]]
    return total / width


def page_scores(tokens: np.ndarray, page_size: int) -> np.ndarray:
    """Scores of pages, the sums of their tokens': [..., tokens] to [..., pages]; the last page may be short."""
    whole = np.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, -tokens.shape[-1] % page_size)])
    return whole.reshape(*whole.shape[:-1], -1, page_size).sum(axis=-1)


def page_masses(page_lse: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """Shares of the attention that pages got, means over the group: [num_kv_heads, pages] of a row's page_lse
    [num_kv_heads, pages, group_size] and lse [num_q_heads], as a dense step gives them (DecodeEngine.run(page_lse=..)).
    """
    with np.errstate(invalid="ignore"):
        shares = np.exp(page_lse - lse.reshape(len(page_lse), 1, -1))
    return np.nan_to_num(shares).mean(axis=-1)
