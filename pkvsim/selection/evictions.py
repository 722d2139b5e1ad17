"""Which pages a prompt keeps, by the methods that evict: from what its last queries looked at to places of pages.

Token scores are the methods' own (pkvsim.selection.methods); a page's is the sum of its tokens'. Per head, every KV
head keeps places of its own, which a pool of pages of one head carries out (PageAllocator.by_head); whole pages go for
all heads of a layer at once, by the mean of the heads' scores, or the largest of DefensiveKV's, whose rule is the worst
case. PageAllocator.evict() then gives back what is not kept.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pkvsim.selection.budgets import across_heads, across_layers
from pkvsim.selection.masses import page_scores
from pkvsim.selection.methods import defensivekv, h2o, snapkv, streaming_llm, tova
from pkvsim.selection.rules import Budget, Pins, top_pages

METHODS = ("streaming_llm", "h2o", "tova", "snapkv", "defensivekv", "layer_defensivekv")
WINDOWS = {"snapkv": snapkv.WINDOW, "defensivekv": defensivekv.WINDOW, "layer_defensivekv": defensivekv.WINDOW}


class Seen(NamedTuple):
    """What one layer of a prompt shows of its tokens."""

    attention: np.ndarray  # [num_q_heads, queries, tokens], weights of the last queries, causal
    value_norms: np.ndarray | None = None  # [num_kv_heads, tokens], defensivekv.projected_norms, for DefensiveKV


def check_method(method: str) -> str:
    """Raises ValueError naming method."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return method


def token_scores(method: str, seen: Seen, num_kv_heads: int, most: int) -> np.ndarray:
    """Scores of a layer's tokens, [num_kv_heads, tokens]; most: tokens that a head keeps on average.

    Raises ValueError naming method, or value_norms where DefensiveKV has none.
    """
    attention = seen.attention
    if method == "h2o":
        return h2o.scores(attention, num_kv_heads)
    if method == "tova":
        return tova.scores(attention, num_kv_heads)
    if method == "snapkv":
        return snapkv.scores(attention, num_kv_heads)
    if method not in ("defensivekv", "layer_defensivekv"):
        raise ValueError(f"method: expected one that scores tokens, got {method!r}")
    if seen.value_norms is None:
        raise ValueError(f"value_norms: expected those of a layer's tokens for {method}, got None")
    return defensivekv.scores(attention, seen.value_norms, num_kv_heads, most)


def kept_pages(method: str, layers: Sequence[Seen], num_kv_heads: int, budget: Budget, *, page_size: int = 1,
               pins: Pins = Pins(0, 0), whole: bool = False) -> list[list[np.ndarray]]:  # noqa: B008
    """Places of the pages that each layer's KV heads keep of a prompt, ascending int32; budget: of each head, or on
    average where heads (DefensiveKV) or layers (Layer-DefensiveKV) share it.

    whole: all heads of a layer keep the same. A prompt no longer than the method's window keeps everything. Raises
    ValueError naming the argument.
    """
    check_method(method)
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    tokens = layers[0].attention.shape[-1]
    count = budget.pages(-(-tokens // page_size), pins)
    places = keeps_all(method, tokens, page_size, count)
    if places is not None:
        return [[places] * num_kv_heads for _ in layers]
    scores = [scored_pages(method, seen, num_kv_heads, count, page_size=page_size) for seen in layers]
    return kept_of_scores(method, scores, count, pins=pins, whole=whole)


def keeps_all(method: str, tokens: int, page_size: int, count: int) -> np.ndarray | None:
    """The places that every head of every layer keeps, where no scores say so: StreamingLLM's, and all of a prompt no
    longer than the method's window."""
    pages = -(-tokens // page_size)
    if method == "streaming_llm":
        return streaming_llm.places(pages, count, page_size)
    return np.arange(pages, dtype=np.int32) if tokens <= WINDOWS.get(method, 0) else None


def scored_pages(method: str, seen: Seen, num_kv_heads: int, count: int, *, page_size: int = 1) -> np.ndarray:
    """Scores of a layer's pages, [num_kv_heads, pages], of which a head keeps `count` on average. Raises ValueError as
    token_scores."""
    return page_scores(token_scores(method, seen, num_kv_heads, count * page_size), page_size)


def kept_of_scores(method: str, scores: Sequence[np.ndarray], count: int, *, pins: Pins = Pins(0, 0),  # noqa: B008
                   whole: bool = False) -> list[list[np.ndarray]]:
    """What kept_pages gives of the layers' scores [num_kv_heads, pages]."""
    of_pages, num_kv_heads = list(scores), len(scores[0])
    if whole:
        worst = method in ("defensivekv", "layer_defensivekv")
        of_pages = [(own.max(axis=0) if worst else own.mean(axis=0))[None] for own in of_pages]
    heads = len(of_pages[0])
    if method == "layer_defensivekv":
        kept = across_layers(of_pages, count * heads * len(of_pages), pins)
    elif method == "defensivekv":
        kept = [across_heads(own, count * heads, pins) for own in of_pages]
    elif method == "h2o":
        kept = [[h2o.places(one, count) for one in own] for own in of_pages]
    else:
        kept = [[top_pages(one, count, pins) for one in own] for own in of_pages]
    return [layer * num_kv_heads for layer in kept] if whole else kept
