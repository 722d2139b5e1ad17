"""SentenceKV (Zhu et al., COLM 2025, arXiv 2504.00970): whole sentences, found by what they mean.

A sentence is its mean key; what is asked is the mean query of the sentence that is being written. Sentences are taken
in the order of their scores while they fit the budget of tokens, and the pages that hold them are read. Retrieval is
made anew for every sentence.
"""
from __future__ import annotations

import numpy as np


def sentence_keys(keys: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Mean keys of sentences, [sentences, head_dim], of keys [tokens, head_dim]; begins [sentences]: their first
    tokens."""
    return np.array([part.mean(axis=0) for part in np.split(keys, begins[1:])])


def places(mean_q: np.ndarray, means: np.ndarray, begins: np.ndarray, tokens: int, most_tokens: int,
           page_size: int) -> np.ndarray:
    """Of one KV head: the pages of the sentences that are taken, ascending int32.

    mean_q [group_size, head_dim] of the current sentence; means: sentence_keys. most_tokens: the budget. A sentence
    that does not fit is passed over.
    """
    scores = (mean_q @ means.T).mean(axis=0)
    ends = np.append(begins[1:], tokens)
    pages: set[int] = set()
    left = most_tokens
    for sentence in np.argsort(-scores, kind="stable"):
        if ends[sentence] - begins[sentence] <= left:
            left -= int(ends[sentence] - begins[sentence])
            pages.update(range(int(begins[sentence]) // page_size, -(-int(ends[sentence]) // page_size)))
    return np.array(sorted(pages), np.int32)
