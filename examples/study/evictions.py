"""Which tokens each KV head keeps after the prompt, before anything is asked, by the rules of pkvsim.selection."""
from __future__ import annotations

import numpy as np
import torch

from pkvsim.selection.evictions import Seen, kept_pages
from pkvsim.selection.methods import defensivekv
from pkvsim.selection.rules import Budget
from study.llama import Cache, Llama


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
    """Tokens that each layer's KV heads keep, ascending, `fraction` of all of them together. H2O's sums are over the
    queries of the prompt's end, which stand for all of them."""
    seen = []
    for layer in range(model.layers):
        norms = None
        if "defensivekv" in method:
            values = cache.values(layer).double().cpu().numpy()
            norms = defensivekv.projected_norms(values, model.output_projection(layer).double().cpu().numpy())
        seen.append(Seen(window_attention(cache, layer), norms))
    return kept_pages(method, seen, model.kv_heads, Budget(fraction, 1))


class Kept:
    """A Chooser that reads the kept tokens and all that came after them."""

    def __init__(self, kept: list[list[np.ndarray]], evicted_at: int, device: str) -> None:
        self._kept = [[torch.from_numpy(own.astype(np.int64)).to(device) for own in layer] for layer in kept]
        self._evicted_at = evicted_at

    def __call__(self, layer: int, q: torch.Tensor, cache: Cache) -> list[torch.Tensor]:
        later = torch.arange(self._evicted_at, cache.length, device=q.device)
        return [torch.cat((own, later)) for own in self._kept[layer]]
