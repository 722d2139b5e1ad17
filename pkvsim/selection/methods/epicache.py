"""EpiCache (Kim et al., arXiv 2509.17396): a long conversation as episodes, each with a cache of its own.

Turns are clustered by their embeddings; an episode's prompt is its medoid turn. The conversation is prefilled block by
block, and after each block every episode keeps the tokens that its prompt attends to most: the largest weight over the
group and over the prompt. A new question reads the list of the nearest episode. Layers whose keys drift little when the
cache is compressed keep less: budgets go by (1 - cosine of the keys with and without)^alpha.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.budgets import by_weight
from pkvsim.selection.masses import group_max

ALPHA = 1.1


def episodes(embeddings: np.ndarray, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(episode of each turn [turns], medoid turn of each episode [episodes]) by k-means; embeddings [turns, width].

    Episodes without turns are left out, so there may be fewer than `count`.
    """
    from scipy.cluster.vq import kmeans2

    centroids, found = kmeans2(np.asarray(embeddings, np.float64), count, minit="++", seed=seed)
    used, labels = np.unique(found, return_inverse=True)
    distance = np.linalg.norm(embeddings - centroids[found], axis=1)
    medoids = [int(np.flatnonzero(labels == i)[np.argmin(distance[labels == i])]) for i in range(len(used))]
    return labels, np.array(medoids)


def nearest(embedding: np.ndarray, medoid_embeddings: np.ndarray) -> int:
    """The episode whose medoid [episodes, width] has the largest cosine to a question's embedding [width]."""
    norms = np.linalg.norm(medoid_embeddings, axis=1) * np.linalg.norm(embedding)
    return int(np.argmax(medoid_embeddings @ embedding / norms))


def scores(attention: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Of tokens, [num_kv_heads, tokens]: attention of the medoid prompt's queries over them."""
    return group_max(attention.max(axis=1), num_kv_heads)


def layer_budgets(cosines: np.ndarray, total: int, most: int, *, alpha: float = ALPHA) -> np.ndarray:
    """Pages of each layer, int64 [layers], `total` together and at most `most` each: by its keys' drift, 1 - cosine."""
    drift = np.maximum(0.0, 1.0 - np.asarray(cosines, np.float64))  # a rounded cosine may be above 1
    return by_weight(drift**alpha, total, most)
