"""Which pages each KV head reads, by the rules of pkvsim.selection, for many methods, budgets and steps at once.

The arrays are torch's, so that a GPU chooses for all of them in a few launches; tests hold them to the rules in NumPy.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pkvsim.selection import centroids as parts
from pkvsim.selection.methods import centroids, kascade, mean_std, quest, streaming_llm, twilight
from pkvsim.selection.rules import Budget, Pins
from study.llama import LayerStep

DENSE_LAYERS = 2
ANCHORS_EVERY = 3  # layers, for Kascade's lists in a model without development data
LEAST_PAGES = 8
RULES = {"mean_std": mean_std, "quest": quest, "centroids": centroids}


class Choice(NamedTuple):
    """method: "oracle" (the exact mass of every page), "mean_std", "quest", these with "_8bit", "centroids",
    "quest_softmax" (Quest's bound, aggregated as mean_std is), "streaming_llm", "twilight" (top p of mean_std, whose
    candidates are a quarter of the pages), "kascade" (exact lists in every third layer), or "random"."""

    method: str
    fraction: float


def summarize(pages: torch.Tensor, kind: str, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Summaries [..., 2, head_dim] of pages [..., page_size, head_dim], of the tokens that are valid [..., page_size];
    a page of which none is gets anything finite. Of centroids they are [..., 8, head_dim + 1]: as they are kept, the
    log2 of the count last."""
    if kind == parts.CENTROIDS:
        return page_centroids(pages, torch.ones(pages.shape[:-1], dtype=torch.bool, device=pages.device)
                              if valid is None else valid.expand(pages.shape[:-1]))  # fmt: skip
    if kind == "min_max":
        if valid is None:
            return torch.stack((pages.amin(-2), pages.amax(-2)), dim=-2)
        there = valid[..., None]
        low, high = (pages.masked_fill(~there, fill) for fill in (torch.inf, -torch.inf))
        return torch.stack((low.amin(-2), high.amax(-2)), dim=-2).nan_to_num(0, 0, 0)
    if valid is None:
        return torch.stack((pages.mean(-2), pages.std(-2, correction=0)), dim=-2)
    there = valid[..., None].to(pages.dtype)
    count = there.sum(-2).clamp(min=1)
    mean = (pages * there).sum(-2) / count
    var = ((pages - mean[..., None, :]).square() * there).sum(-2) / count
    return torch.stack((mean, var.sqrt()), dim=-2)


def page_centroids(pages: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """pkvsim.selection.centroids' of many pages at once, through its codes."""
    infinite = torch.full(pages.shape[:-1], torch.inf, dtype=pages.dtype, device=pages.device)
    nearest, owner = infinite, torch.zeros(pages.shape[:-1], dtype=torch.int64, device=pages.device)
    seed = torch.zeros((*pages.shape[:-2], 1, 1), dtype=torch.int64, device=pages.device)
    for part in range(parts.PARTS):
        own = pages.gather(-2, seed.expand(*seed.shape[:-1], pages.shape[-1]))
        distance = (pages - own).square().sum(-1)
        owner = torch.where(distance < nearest, part, owner)
        nearest = torch.minimum(nearest, distance)
        seed = nearest.masked_fill(~valid, -1).argmax(-1)[..., None, None]
    member = (torch.nn.functional.one_hot(owner, parts.PARTS).bool() & valid[..., None]).mT.to(pages.dtype)
    count = member.sum(-1, keepdim=True)
    means = member @ pages.masked_fill(~valid[..., None], 0) / count.clamp(min=1)
    step = (means.abs().amax(-1, keepdim=True) / parts.STEPS).half().to(means.dtype)
    codes = torch.where(step > 0, means / step, 0).round().clamp(-parts.ZERO, parts.LARGEST_CODE - parts.ZERO)
    log2_count = torch.where(count > 0, count.clamp(min=1).log2(), parts.NO_TOKENS).half().to(means.dtype)
    return torch.cat((codes * step, log2_count), -1)


def in_8_bits(summaries: torch.Tensor) -> torch.Tensor:
    """Each vector of a summary as int8 with a scale of its own."""
    scale = summaries.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (summaries / scale).round() * scale


def page_logits(kind: str, q: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """The logits of a method of RULES: [..., queries, pages] of queries [..., queries, head_dim] and summaries
    [..., pages, 2, head_dim], or those of centroids."""
    if kind == "centroids":
        means, counts = summaries[..., :-1].flatten(-3, -2), summaries[..., -1].flatten(-2, -1)
        logits = scale * (q @ means.mT) + math.log(2) * counts[..., None, :]
        return torch.logsumexp(logits.unflatten(-1, (-1, parts.PARTS)), -1)
    first, second = summaries[..., 0, :].mT, summaries[..., 1, :].mT
    if kind == "mean_std":
        return scale * (q @ first + mean_std.DEVIATIONS * (q.square() @ second.square()).sqrt())
    return scale * (q.clamp(max=0) @ first + q.clamp(min=0) @ second)


def top_pages(scores: torch.Tensor, counts: torch.Tensor, pinned: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """rules.top_pages as masks: scores [..., pages]; counts [..., 1], pinned and there broadcast to them."""
    scores = scores.masked_fill(pinned, torch.inf).masked_fill(~there, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    at = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, at) < counts) & there


class PageChooser:
    """The pages of all choices in each layer of one block of new tokens."""

    def __init__(self, choices: list[Choice], *, page_size: int = 16, pins: Pins = Pins(1, 2)) -> None:
        self.choices, self.page_size, self.pins = choices, page_size, pins
        self.read: torch.Tensor | None = None  # [choices, 2], tokens read and there, of the layers that are not dense
        self._counts: torch.Tensor | None = None  # [choices, new_tokens, 1], pages of each budget
        self._anchors: torch.Tensor | None = None  # pages of Kascade's choices in its last anchor
        self._rng: torch.Generator | None = None

    def __call__(self, layer: int, step: LayerStep) -> torch.Tensor:
        """Tokens that each choice's heads see, bool [choices, num_kv_heads, new_tokens, tokens]; step: of as many
        variants as there are choices."""
        _, heads, _, new = step.q.shape[:4]
        shape = len(self.choices), heads, new, step.tokens
        if layer < DENSE_LAYERS:
            return torch.ones(shape, dtype=torch.bool, device=step.q.device)
        size = self.page_size
        lengths = torch.arange(step.tokens - new + 1, step.tokens + 1, device=step.q.device)  # at each new token
        pages = -(-lengths // size)[:, None]
        at = torch.arange(-(-step.tokens // size), device=step.q.device)
        there = at < pages
        pinned = there & ((at < self.pins.sink_pages) | (at >= pages - self.pins.recent_pages))
        if self._counts is None:
            self._counts = torch.tensor([[[Budget(choice.fraction, LEAST_PAGES).pages(count, self.pins)]
                                          for count in pages.flatten().tolist()] for choice in self.choices],
                                        device=step.q.device)
        chosen = torch.zeros(*shape[:3], len(at), dtype=torch.bool, device=step.q.device)
        for method in dict.fromkeys(choice.method for choice in self.choices):
            own = [i for i, choice in enumerate(self.choices) if choice.method == method]
            chosen[own] = self._pages(method, layer, step.of(own), self._counts[own][:, None], pinned, there)
        seen = chosen.repeat_interleave(size, -1)[..., : step.tokens]
        causal = torch.arange(step.tokens, device=step.q.device) < lengths[:, None]
        seen &= causal
        read = torch.stack((seen.sum((1, 2, 3)), causal.sum().expand(len(seen)) * heads), 1)
        self.read = read if self.read is None else self.read + read
        return seen

    def shares(self) -> list[float]:
        """Of the tokens there, what each choice read in the layers that are not dense."""
        return (self.read[:, 0] / self.read[:, 1]).tolist()

    def _pages(self, method: str, layer: int, step: LayerStep, counts: torch.Tensor, pinned: torch.Tensor,
               there: torch.Tensor) -> torch.Tensor:
        """Pages of a method's choices, bool [choices, num_kv_heads, new_tokens, pages]."""
        shape = *step.q.shape[:2], step.q.shape[3], there.shape[-1]
        if method == "streaming_llm":
            sinks = counts.clamp(max=-(-streaming_llm.SINK_TOKENS // self.page_size))
            at, pages = torch.arange(shape[-1], device=there.device), there.sum(-1, keepdim=True)
            return (((at < sinks) | (at >= pages - (counts - sinks))) & there).expand(shape)
        if method == "random":
            if self._rng is None:
                self._rng = torch.Generator(there.device).manual_seed(0)
            scores = torch.rand(shape, generator=self._rng, device=there.device, dtype=torch.float64)
            return top_pages(scores, counts, pinned, there)
        if method == "kascade" and (layer - DENSE_LAYERS) % ANCHORS_EVERY:
            return self._anchors
        if method in ("oracle", "kascade"):
            weights = torch.softmax(step.logits, dim=-1).mean(2).double()
            padded = torch.nn.functional.pad(weights, (0, shape[-1] * self.page_size - step.tokens))
            if method == "kascade":
                least = [kascade.budget(self.page_size).pages(int(count), self.pins) for count in there.sum(-1)]
                counts = counts.maximum(torch.tensor(least, device=counts.device)[:, None])
            found = top_pages(padded.unflatten(-1, (-1, self.page_size)).sum(-1), counts, pinned, there)
            if method == "kascade":
                self._anchors = found
            return found
        base = {"twilight": "mean_std"}.get(method, method.removesuffix("_8bit").removesuffix("_softmax"))
        logits = self._logits(base, step, method.endswith("_8bit")).masked_fill(~there, -torch.inf)
        if base == "quest" and not method.endswith("_softmax"):
            return top_pages(logits.amax(2), counts, pinned, there)
        scores = torch.softmax(logits, dim=-1).mean(2)
        if method != "twilight":
            return top_pages(scores, counts, pinned, there)
        first = top_pages(scores, counts.maximum(there.sum(-1, keepdim=True) // 4), pinned, there)
        weights = torch.softmax(logits.masked_fill(~first[:, :, None], -torch.inf), dim=-1).mean(2)
        return top_share(weights, twilight.SHARE, pinned) & first | pinned

    def _logits(self, kind: str, step: LayerStep, rounded: bool) -> torch.Tensor:
        """Of all pages by their summaries, float64 [choices, num_kv_heads, group_size, new_tokens, pages]; pages with
        new tokens are summarised as they are at each of these."""
        size, q = self.page_size, step.q.double()
        choices, heads, group, new, dim = q.shape
        before = step.keys.shape[1]
        whole = before // size
        summaries = summarize(step.keys[:, : whole * size].double().unflatten(1, (whole, size)), RULES[kind].SUMMARY)
        tail = torch.cat((step.keys[None, :, whole * size :].expand(choices, -1, -1, -1), step.new_keys), 2).double()
        pages = -(-tail.shape[2] // size)
        tail = torch.nn.functional.pad(tail, (0, 0, 0, pages * size - tail.shape[2])).unflatten(2, (pages, size))
        lengths = torch.arange(before - whole * size + 1, before - whole * size + new + 1, device=q.device)
        valid = torch.arange(pages * size, device=q.device).view(pages, size) < lengths[:, None, None]
        last = summarize(tail[:, :, None].expand(-1, -1, new, -1, -1, -1), RULES[kind].SUMMARY, valid)
        if rounded:
            summaries, last = in_8_bits(summaries), in_8_bits(last)
        scale = dim**-0.5
        old = page_logits(kind, q.flatten(2, 3), summaries, scale).unflatten(2, (group, new))
        by_step = page_logits(kind, q.transpose(2, 3), last, scale).transpose(2, 3)
        return torch.cat((old, by_step), -1)


def top_share(weights: torch.Tensor, share: float, pinned: torch.Tensor) -> torch.Tensor:
    """rules.top_share as masks: weights [..., pages], pinned broadcasts to them."""
    order = weights.masked_fill(pinned, torch.inf).argsort(dim=-1, descending=True, stable=True)
    total = weights.gather(-1, order).cumsum(-1)
    before = torch.nn.functional.pad(total[..., :-1], (1, 0))
    taken = before < share * weights.sum(-1, keepdim=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, taken) | pinned
