"""TOVA (Oren et al., EMNLP 2024, arXiv 2401.06104): the state of the last query decides.

A token's score is the last query's weight on it, averaged over all heads of the layer, which therefore keep the same
tokens. The last token itself is always kept. Evicts.
"""
from __future__ import annotations

import numpy as np


def scores(attention: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Of tokens, [num_kv_heads, tokens]: the same for all heads."""
    last = attention[:, -1].mean(axis=0)
    last[-1] = last.max() + 1
    return np.tile(last, (num_kv_heads, 1))
