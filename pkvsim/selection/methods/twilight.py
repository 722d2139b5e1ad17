"""Twilight (Lin et al., NeurIPS 2025, arXiv 2502.02770): top p instead of top k.

Some method takes more pages than will be needed; of these, the fewest whose estimated weights add up to a share p are
read. So a head with one sharp page reads few and a flat one many. The estimate is any method's logits; the paper's is
from keys of 4 bits.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import Pins, softmax_mean, top_share

SHARE = 0.95


def places(logits: np.ndarray, candidates: np.ndarray, pins: Pins, row_pages: int, *,
           share: float = SHARE) -> np.ndarray:
    """Of one KV head: the pages that are read, ascending.

    logits [group_size, row_pages] estimated; candidates: places that the first method took, ascending.
    """
    weights = np.zeros(row_pages)
    weights[candidates] = softmax_mean(logits[:, candidates])
    chosen = top_share(weights, share, pins)
    pinned = np.flatnonzero(pins.pinned(row_pages))
    return np.union1d(np.intersect1d(chosen, candidates), pinned).astype(np.int32)
