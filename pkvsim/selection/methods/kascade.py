"""Kascade (Deshmukh et al., arXiv 2512.16391): exact top k in anchor layers, reused by the layers between.

In an anchor layer the exact weights, softmax over the tokens and then the mean over the group, choose 10 % of the row
but at least 128 tokens. A layer between reads, for each of its heads, the list of that head of the anchor which was
most like it on development data (the head map). Which layers are anchors is the choice that keeps the most similarity
in all, by dynamic programming; the first layer is dense.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import Budget

LEAST_TOKENS, FRACTION = 128, 0.1


def budget(page_size: int) -> Budget:
    return Budget(FRACTION, -(-LEAST_TOKENS // page_size))


def head_map(similarity: np.ndarray) -> np.ndarray:
    """The anchor's head that each head of a layer reads the list of, [num_kv_heads]; similarity [heads, anchor
    heads]."""
    return np.argmax(similarity, axis=1)


def overlap(weights: np.ndarray, anchor_weights: np.ndarray, count: int) -> np.ndarray:
    """The share of each head's weight that each anchor head's top `count` pages hold, over what its own would, [heads,
    anchor heads]; weights [heads, pages] each."""
    own = np.sort(weights, axis=1)[:, ::-1][:, :count].sum(axis=1)
    lists = np.argsort(-anchor_weights, axis=1, kind="stable")[:, :count]
    return np.array([[row[places].sum() for places in lists] for row in weights]) / own[:, None]


def anchors(similarity: np.ndarray, count: int) -> list[int]:
    """The `count` layers, ascending, that keep the most similarity in all, the first layer one of them.

    similarity [layers, layers]: [a, l] is how much of layer l anchor a's lists keep, a <= l. Each layer reuses the last
    anchor at or before it.
    """
    layers = len(similarity)
    # kept[a, l]: of the layers a..l-1 with anchor a.
    kept = np.zeros((layers, layers + 1))
    for a in range(layers):
        kept[a, a + 1 :] = np.cumsum(similarity[a, a:])
    best = np.full((count + 1, layers + 1), -np.inf)
    came = np.zeros((count + 1, layers + 1), np.int64)
    best[0, 0] = 0.0
    for used in range(1, count + 1):
        for end in range(1, layers + 1):
            options = best[used - 1, :end] + kept[:end, end]
            came[used, end] = int(np.argmax(options))
            best[used, end] = options[came[used, end]]
    chosen, end = [], layers
    for used in range(count, 0, -1):
        end = int(came[used, end])
        chosen.append(end)
    return chosen[::-1]
