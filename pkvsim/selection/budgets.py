"""Budgets that heads and layers share: the largest scores win wherever they are, above a share that everyone keeps."""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import Pins, top_pages


def across_heads(scores: np.ndarray, total: int, pins: Pins, *, least: int = 0) -> list[np.ndarray]:
    """Places of each head, ascending int32, `total` of all heads together: pinned ones, the `least` best of each head,
    then the largest scores of any (top k over a layer's heads, as AdaKV, arXiv 2407.11550, has it).

    scores [num_kv_heads, row_pages]. Of equal scores the first head's, then the first page's is taken.
    """
    heads, pages = scores.shape
    forced = np.zeros((heads, pages), bool)
    for head in range(heads):
        forced[head, top_pages(scores[head], min(pages, max(least, int(pins.pinned(pages).sum()))), pins)] = True
    left = max(0, min(total, heads * pages) - int(forced.sum()))
    order = np.argsort(-scores.reshape(-1), kind="stable")
    forced.reshape(-1)[order[~forced.reshape(-1)[order]][:left]] = True
    return [np.flatnonzero(head).astype(np.int32) for head in forced]


def across_layers(
    scores: list[np.ndarray], total: int, pins: Pins, *, least: int = 0
) -> list[list[np.ndarray]]:  # fmt: skip
    """across_heads over the heads of all layers: places by layer and head. scores: [num_kv_heads, row_pages] each."""
    found = across_heads(np.concatenate(scores), total, pins, least=least)
    ends = np.cumsum([len(layer) for layer in scores])
    return [found[end - len(layer) : end] for layer, end in zip(scores, ends)]


def by_weight(weights: np.ndarray, total: int, most: int, *, least: int = 1) -> np.ndarray:
    """Shares of `total` in proportion to weights [layers], int64, each from `least` to `most`: largest remainders, the
    first of equal ones. What a share cannot take goes to the others. Raises ValueError naming weights that are not
    finite numbers from 0 on."""
    weights = np.asarray(weights, np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"weights: expected finite numbers from 0 on, got {weights.tolist()}")
    counts = np.full(len(weights), least, np.int64)
    left = max(0, min(total, most * len(weights)) - int(counts.sum()))
    while left > 0:
        open_ = counts < most
        share = np.where(open_, weights, 0.0)
        share = np.where(open_, 1.0, 0.0) if share.sum() == 0 else share
        wanted = left * share / share.sum()
        given = np.minimum(np.floor(wanted).astype(np.int64), most - counts)
        if given.sum() == 0:
            best = np.lexsort((np.arange(len(weights)), -(wanted * open_)))
            given[[i for i in best if open_[i]][:left]] = 1
        counts += given
        left -= int(given.sum())
    return counts
