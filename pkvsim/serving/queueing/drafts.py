"""Speculative decoding: how many tokens a row gives in a step that checks drafts. Compiled, for
pkvsim.serving.scheduling.

Every draft is accepted with the same probability, independently, until the first that is not; the step gives one token
more of its own. With k drafts and probability p a step gives (1 - p^(k + 1)) / (1 - p) tokens a row in the mean
(Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, equation 1,
https://arxiv.org/abs/2211.17192).
"""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import inner

_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)


def expected_tokens(query_tokens: int, acceptance: float) -> float:
    """Mean tokens of a row's step that checks query_tokens - 1 drafts."""
    if acceptance == 1:
        return float(query_tokens)
    return (1 - acceptance**query_tokens) / (1 - acceptance)


@inner
def uniform(seed, request, place):
    """In [0, 1), the same for the same three numbers: SplitMix64 (Steele, Lea and Flood 2014) of a counter. So every
    policy and every batch sees a request's drafts accepted alike."""
    x = (np.uint64(seed) * _SECOND + np.uint64(request)) * _FIRST + np.uint64(place)
    x = x * _GOLDEN + _GOLDEN
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    x = x ^ (x >> _31)
    return float(x >> _11) * (1.0 / 9007199254740992.0)


@inner
def tokens_of_step(limits, request, generated, left):
    """Tokens that a row which has given `generated` and has `left` to give gives in a step."""
    tokens = 1
    while tokens < min(limits.query_tokens, left) and (
        uniform(limits.draft_seed, request, generated + tokens) < limits.acceptance
    ):
        tokens += 1
    return tokens
