"""LouisKV (Wu et al., arXiv 2510.11292): retrieval only when the query turns, by centroids of what belongs together.

The prompt's keys are clustered; the output's are cut into segments of neighbours whose keys are alike. A unit's score
is the softmax over units of q . centroid, averaged over the group; units are taken by score within the budget of
tokens. The last lists stay while the query's direction is near that of the retrieval.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import softmax_mean

TURN = 0.7  # the cosine below which lists are made anew; an assumption, for the paper tunes it per model


def turned(q: np.ndarray, q_of_lists: np.ndarray, threshold: float = TURN) -> bool:
    """Whether the mean cosine over the query heads, [num_q_heads, head_dim] each, has fallen below the threshold."""
    norms = np.linalg.norm(q, axis=-1) * np.linalg.norm(q_of_lists, axis=-1)
    return bool(((q * q_of_lists).sum(axis=-1) / norms).mean() < threshold)


def segments(keys: np.ndarray, similarity: float) -> np.ndarray:
    """First tokens of the output's segments, [segments]: one begins where a key's cosine to the mean of the running
    segment falls below `similarity`. keys [tokens, head_dim]."""
    begins, mean, count = [0], keys[0].astype(np.float64), 1
    for at, key in enumerate(keys[1:], start=1):
        if key @ mean < similarity * np.linalg.norm(key) * np.linalg.norm(mean):
            begins.append(at)
            mean, count = key.astype(np.float64), 1
        else:
            mean, count = mean + (key - mean) / (count + 1), count + 1
    return np.array(begins)


def unit_scores(q: np.ndarray, centroids: np.ndarray, scale: float) -> np.ndarray:
    """Of units, [units]: of a group's queries [group_size, head_dim] and centroids [units, head_dim]."""
    return softmax_mean(scale * q @ centroids.T)


def places(scores: np.ndarray, unit_of_token: np.ndarray, most_tokens: int, page_size: int) -> np.ndarray:
    """The pages of the units that are taken, ascending int32: by score, while they fit most_tokens.

    unit_of_token [tokens]: the unit of each.
    """
    sizes = np.bincount(unit_of_token, minlength=len(scores))
    taken, left = np.zeros(len(scores), bool), most_tokens
    for unit in np.argsort(-scores, kind="stable"):
        if sizes[unit] <= left:
            taken[unit], left = True, left - int(sizes[unit])
    return np.unique(np.flatnonzero(taken[unit_of_token]) // page_size).astype(np.int32)
