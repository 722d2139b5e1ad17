"""Which pages each KV head reads in a decode step, by the rules of pkvsim.selection."""
from __future__ import annotations

import numpy as np
import torch

from pkvsim.selection import by_name
from pkvsim.selection.masses import page_scores
from pkvsim.selection.methods import kascade, streaming_llm, twilight
from pkvsim.selection.rules import Budget, Pins, softmax_mean, top_pages
from study.llama import Cache, Chooser

DENSE_LAYERS = 2
ANCHORS_EVERY = 3  # layers, for Kascade's lists in a model without development data


def summarize(keys: torch.Tensor, page_size: int, kind: str) -> torch.Tensor:
    """Summaries of whole pages of keys [num_kv_heads, tokens, head_dim]: [num_kv_heads, pages, 2, head_dim]; a page
    that is not full gets its tokens'."""
    heads, tokens, dim = keys.shape
    whole = tokens // page_size * page_size
    parts = [keys[:, :whole].reshape(heads, -1, page_size, dim)]
    if whole < tokens:
        parts.append(keys[:, None, whole:])
    found = []
    for part in parts:
        pair = (part.mean(2), part.std(2, correction=0)) if kind == "mean_std" else (part.amin(2), part.amax(2))
        found.append(torch.stack(pair, dim=2))
    return torch.cat(found, dim=1)


def in_8_bits(summaries: torch.Tensor) -> torch.Tensor:
    """Each vector of a summary as int8 with a scale of its own."""
    scale = summaries.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (summaries / scale).round() * scale


class PageChooser:
    """A Chooser of one method and budget. `read` counts the tokens read and there, over the layers that are not dense.

    method: "oracle" (the exact mass of every page), a name of pkvsim.selection.by_name, that with "_8bit",
    "quest_softmax" (Quest's bound, aggregated as mean_std is), "streaming_llm", "twilight" (top p of mean_std, whose
    candidates are a quarter of the pages), "kascade" (exact lists in every third layer), or "random".
    """

    def __init__(self, method: str, budget: Budget, pins: Pins, page_size: int) -> None:
        self.method, self.budget, self.pins, self.page_size = method, budget, pins, page_size
        self.read = np.zeros(2)
        self._lists: list[np.ndarray] = []  # of Kascade's last anchor
        self._rng = np.random.default_rng(0)

    def __call__(self, layer: int, q: torch.Tensor, cache: Cache) -> list[torch.Tensor] | None:
        if layer < DENSE_LAYERS:
            return None
        keys, size = cache.keys(layer), self.page_size
        heads = keys.shape[0]
        pages = -(-cache.length // size)
        count = self.budget.pages(pages, self.pins)
        if self.method == "streaming_llm":
            lists = [streaming_llm.places(pages, count, size)] * heads
        elif self.method == "kascade" and self._lists and (layer - DENSE_LAYERS) % ANCHORS_EVERY:
            lists = self._lists
        else:
            lists = self._score(q.view(heads, -1, q.shape[-1]), keys, count, pages)
        self._lists = lists
        chosen = []
        for places in lists:
            at = (torch.from_numpy(places.astype(np.int64))[:, None] * size + torch.arange(size)).view(-1)
            at = at[at < cache.length]
            self.read += len(at), cache.length
            chosen.append(at.to(keys.device))
        return chosen

    def _score(self, q: torch.Tensor, keys: torch.Tensor, count: int, pages: int) -> list[np.ndarray]:
        """Lists by the scores of each KV head; q [num_kv_heads, group_size, head_dim]."""
        scale = q.shape[-1] ** -0.5
        if self.method in ("oracle", "kascade"):
            weights = torch.softmax(q @ keys.mT * scale, dim=-1).mean(1).double().cpu().numpy()
            budget = kascade.budget(self.page_size).pages(pages, self.pins) if self.method == "kascade" else count
            return [top_pages(row, max(count, budget), self.pins) for row in page_scores(weights, self.page_size)]
        if self.method == "random":
            return [top_pages(self._rng.random(pages), count, self.pins) for _ in keys]
        base = {"twilight": "mean_std"}.get(self.method, self.method.split("_8bit")[0].split("_softmax")[0])
        rule = by_name.method(base)
        summaries = summarize(keys, self.page_size, rule.SUMMARY)
        if self.method.endswith("_8bit"):
            summaries = in_8_bits(summaries)
        lists = []
        for own_q, own in zip(q.double().cpu().numpy(), summaries.double().cpu().numpy()):
            logits = rule.logits(own_q, own, scale)
            if self.method == "twilight":
                first = top_pages(softmax_mean(logits), max(count, pages // 4), self.pins)
                lists.append(twilight.places(logits, first, self.pins, pages))
            elif self.method.endswith("_softmax"):
                lists.append(top_pages(softmax_mean(logits), count, self.pins))
            else:
                lists.append(top_pages(rule.scores(own_q, own, scale), count, self.pins))
        return lists


def chooser(method: str, fraction: float, *, page_size: int = 16) -> Chooser:
    return PageChooser(method, Budget(fraction, 8), Pins(1, 2), page_size)
