"""Which tokens each KV head keeps after the prompt, before anything is asked, by the rules of pkvsim.selection."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pkvsim.selection.evictions import Seen, keeps_all, kept_of_scores, scored_pages
from pkvsim.selection.rules import Budget
from study.llama import Cache, LayerStep, Llama, window_attention


class Evictions:
    """What methods keep of one prompt. Scores that several methods or budgets ask for are computed once, the layers'
    side by side."""

    def __init__(self, model: Llama, cache: Cache) -> None:
        """cache: of a prefill with masses, as H2O's sums are over all queries of the prompt."""
        self.model, self.cache = model, cache
        self._seen: dict[str, list[Seen]] = {}
        self._scores: dict[tuple, list[np.ndarray]] = {}

    def kept(self, method: str, fraction: float) -> list[list[np.ndarray]]:
        """Tokens that each layer's KV heads keep, ascending, `fraction` of all of them together."""
        heads, tokens = self.model.kv_heads, self.cache.length
        count = Budget(fraction, 1).pages(tokens)
        if keeps_all(method, tokens, 1, count) is not None:
            return [[keeps_all(method, tokens, 1, count)] * heads] * self.model.layers
        rule = method.removeprefix("layer_")
        key = (rule, count) if rule == "defensivekv" else (rule,)
        if key not in self._scores:
            with ThreadPoolExecutor() as pool:
                self._scores[key] = list(pool.map(lambda seen: scored_pages(rule, seen, heads, count),
                                                  self._layers("masses" if rule == "h2o" else "window")))
        return kept_of_scores(method, self._scores[key], count)

    def _layers(self, what: str) -> list[Seen]:
        if what not in self._seen:
            self._seen[what] = [self._look(what, layer) for layer in range(self.model.layers)]
        return self._seen[what]

    @torch.inference_mode()
    def _look(self, what: str, layer: int) -> Seen:
        if what == "masses":
            return Seen(self.cache.masses[layer][:, None].double().cpu().numpy())
        attention = window_attention(self.cache.window_q[layer], self.cache.k[layer])
        return Seen(attention.double().cpu().numpy(), value_norms(self.model, self.cache, layer))


def value_norms(model: Llama, cache: Cache, layer: int) -> np.ndarray:
    """defensivekv.projected_norms of a layer, by torch: [num_kv_heads, tokens] float64."""
    weights = model.output_projection(layer).unflatten(0, (model.kv_heads, -1))
    values, found = cache.v[layer], 0
    for member in range(weights.shape[1]):
        found = found + (values @ weights[:, member]).abs().sum(-1, dtype=torch.float64)
    return (found / weights.shape[1]).cpu().numpy()


class Kept:
    """A chooser of variants that each read what they kept and all that came after it."""

    def __init__(self, kept: list[list[list[np.ndarray]]], tokens: int, device: str) -> None:
        """kept: by variant, layer and KV head, of a prompt of so many tokens."""
        seen = np.zeros((len(kept), len(kept[0]), len(kept[0][0]), tokens), bool)
        for at in np.ndindex(seen.shape[:3]):
            seen[at][kept[at[0]][at[1]][at[2]]] = True
        self._seen = torch.from_numpy(seen).to(device)

    def __call__(self, layer: int, step: LayerStep) -> torch.Tensor:
        own = self._seen[:, layer, :, None]
        new = step.q.shape[3]
        later = torch.ones(*own.shape[:2], 1, new, dtype=torch.bool, device=own.device)
        return torch.cat((own, later), -1).expand(-1, -1, new, -1)
