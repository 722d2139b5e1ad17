"""Which tokens each KV head keeps after the prompt, before anything is asked, by the rules of pkvsim.selection."""
from __future__ import annotations

import numpy as np
import torch

from pkvsim.selection.budgets import across_heads, across_layers
from pkvsim.selection.methods import defensivekv, h2o, snapkv, streaming_llm, tova
from pkvsim.selection.rules import Pins, top_pages
from study.llama import Cache, Llama

METHODS = ("streaming_llm", "h2o", "tova", "snapkv", "defensivekv", "layer_defensivekv")
H2O_QUERIES = 256  # at a time, of all of the prompt's


def window_attention(cache: Cache, layer: int) -> np.ndarray:
    """Weights of the prompt's last queries, float64 [num_q_heads, WINDOW, tokens]."""
    return _attention(cache.window_q[layer], cache.keys(layer), cache.length)


def _attention(q: torch.Tensor, keys: torch.Tensor, end: int) -> np.ndarray:
    """Of queries [num_q_heads, queries, head_dim], which are those of the tokens before `end`."""
    logits = q @ keys.repeat_interleave(len(q) // len(keys), 0).mT * q.shape[-1] ** -0.5
    at = torch.arange(keys.shape[1], device=q.device)
    hidden = at[None] > end - q.shape[1] + torch.arange(q.shape[1], device=q.device)[:, None]
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1).double().cpu().numpy()


def kept_tokens(method: str, model: Llama, cache: Cache, fraction: float) -> list[list[np.ndarray]]:
    """Tokens that each layer's KV heads keep, ascending, `fraction` of all of them together."""
    tokens, heads = cache.length, model.kv_heads
    count = max(1, round(fraction * tokens))
    if method == "streaming_llm":
        return [[streaming_llm.places(tokens, count, 1)] * heads for _ in range(model.layers)]
    none = Pins(0, 0)
    scores = []
    for layer in range(model.layers):
        if method == "h2o":
            # Of all queries of the prompt, which the cache has not: those of its end stand for them.
            scores.append(h2o.scores(window_attention(cache, layer), heads))
            continue
        attention = window_attention(cache, layer)
        if method == "tova":
            scores.append(tova.scores(attention, heads))
        elif method == "snapkv":
            scores.append(snapkv.scores(attention, heads))
        else:
            values = cache.values(layer).double().cpu().numpy()
            norms = defensivekv.projected_norms(values, model.output_projection(layer).double().cpu().numpy())
            scores.append(defensivekv.scores(attention, norms, heads, count))
    if method == "h2o":
        return [[h2o.places(own, count) for own in layer] for layer in scores]
    if method == "defensivekv":
        return [across_heads(layer, count * heads, none) for layer in scores]
    if method == "layer_defensivekv":
        return across_layers(scores, count * heads * model.layers, none)
    return [[top_pages(own, count, none) for own in layer] for layer in scores]


class Kept:
    """A Chooser that reads the kept tokens and all that came after them."""

    def __init__(self, kept: list[list[np.ndarray]], evicted_at: int, device: str) -> None:
        self._kept = [[torch.from_numpy(own.astype(np.int64)).to(device) for own in layer] for layer in kept]
        self._evicted_at = evicted_at

    def __call__(self, layer: int, q: torch.Tensor, cache: Cache) -> list[torch.Tensor]:
        later = torch.arange(self._evicted_at, cache.length, device=q.device)
        return [torch.cat((own, later)) for own in self._kept[layer]]
