"""Which pages each KV head reads, by the rules of pkvsim.selection, for many methods, budgets and steps at once.

The arrays are torch's, so that a GPU chooses for all of them in a few launches; tests hold them to the rules in NumPy.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pkvsim.selection import centroids as parts
from pkvsim.selection.methods import centroids, kascade, mean_std, quest, streaming_llm, twilight
from study.llama import LayerStep
from study.variants import DENSE_LAYERS, Variant, parse

ANCHORS_EVERY = 3  # layers, for Kascade's lists in a model without development data
MOST_OF_TOP_P = 3  # times the budget's pages that a list of top p may have
RULES = {"mean_std": mean_std, "quest": quest, "centroids": centroids}


class Choice(NamedTuple):
    """method: "oracle" (the exact mass of every page), "mean_std", "quest", these with "_8bit", "centroids",
    "quest_softmax" (Quest's bound, aggregated as mean_std is), "streaming_llm", "twilight" (top p of mean_std, whose
    candidates are a quarter of the pages), "kascade" (exact lists in every third layer), or "random"; and the
    words of study.variants after those."""

    method: str
    fraction: float


def summarize(pages: torch.Tensor, kind: str, valid: torch.Tensor | None = None, how: Variant | None = None,
              weights: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Summaries [..., 2, head_dim] of pages [..., page_size, head_dim], of the tokens that are valid [..., page_size];
    a page of which none is gets anything finite. Of centroids they are [..., 8, head_dim + 1]: as they are kept, the
    log2 of the count last; how and weights as page_centroids has them."""
    if kind == parts.CENTROIDS:
        valid = torch.ones((), dtype=torch.bool, device=pages.device) if valid is None else valid
        return page_centroids(pages, valid.expand(pages.shape[:-1]), how or Variant(kind), weights)
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


def page_centroids(pages: torch.Tensor, valid: torch.Tensor, how: Variant = Variant("centroids"),  # noqa: B008
                   weights: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """pkvsim.selection.centroids' of many pages at once, through their codes, and changed as `how` says.

    weights: of elements, broadcast to pages, which `how.weighted` and `how.spread` take.
    """
    seen = pages * weights if how.weighted else pages
    infinite = torch.full(pages.shape[:-1], torch.inf, dtype=pages.dtype, device=pages.device)
    nearest, owner = infinite, torch.zeros(pages.shape[:-1], dtype=torch.int64, device=pages.device)
    seed = torch.zeros((*pages.shape[:-2], 1, 1), dtype=torch.int64, device=pages.device)
    for part in range(how.parts):
        apart = seen - seen.gather(-2, seed.expand(*seed.shape[:-1], pages.shape[-1]))
        distance = apart.abs().amax(-1) if how.linf else apart.square().sum(-1)
        owner = torch.where(distance < nearest, part, owner)
        nearest = torch.minimum(nearest, distance)
        seed = nearest.masked_fill(~valid, -1).argmax(-1)[..., None, None]
    member = (torch.nn.functional.one_hot(owner, how.parts).bool() & valid[..., None]).mT.to(pages.dtype)
    count = member.sum(-1, keepdim=True)
    means = member @ pages.masked_fill(~valid[..., None], 0) / count.clamp(min=1)
    log2_count = torch.where(count > 0, count.clamp(min=1).log2(), parts.NO_TOKENS)
    if how.spread:
        there = (pages * weights).masked_fill(~valid[..., None], 0)
        variance = member @ there.square() / count.clamp(min=1) - (member @ there / count.clamp(min=1)).square()
        deviation = variance.clamp(min=0).sum(-1, keepdim=True).sqrt() * pages.shape[-1] ** -0.5  # of logits
        log2_count = torch.where(count > 0, log2_count + how.spread * deviation / math.log(2), log2_count)
    if how.bits:
        zero = 2 ** (how.bits - 1)
        step = (means.abs().amax(-1, keepdim=True) / (zero - 0.5)).half().to(means.dtype)
        means = torch.where(step > 0, means / step, 0).round().clamp(-zero, zero - 1) * step
    return torch.cat((means, log2_count.half().to(means.dtype)), -1)


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
        return torch.logsumexp(logits.unflatten(-1, (-1, summaries.shape[-2])), -1)
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

    def __init__(self, choices: list[Choice], *, layers: int | None = None, window_q: list[torch.Tensor] | None = None,
                 page_size: int = 16) -> None:  # fmt: skip
        """layers: of the model, for methods whose budgets differ by layer. window_q: queries of any text by layer
        [num_q_heads, queries, head_dim], for methods that weigh elements by them."""
        self.choices, self.page_size, self.layers, self.window_q = choices, page_size, layers, window_q
        self.variants = {choice.method: parse(choice.method) for choice in choices}
        if window_q is None and any(how.weighted or how.spread for how in self.variants.values()):
            raise ValueError("window_q: expected queries for methods that weigh elements by them, got None")
        self.read: torch.Tensor | None = None  # [choices, 2], tokens read and there, of the layers that are not dense
        self._counts: dict[tuple[float, ...], torch.Tensor] = {}  # [choices, new_tokens, 1], pages of each budget
        self._kept: dict[tuple[str, ...], torch.Tensor] = {}  # of the layer's whole pages, which methods share
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
        self._kept = {}
        chosen = torch.zeros(*shape[:3], len(at), dtype=torch.bool, device=step.q.device)
        for method in dict.fromkeys(choice.method for choice in self.choices):
            own = [i for i, choice in enumerate(self.choices) if choice.method == method]
            if layer < self.variants[method].dense:
                chosen[own] = there
                continue
            pins = self.variants[method].pins
            pinned = there & ((at < pins.sink_pages) | (at >= pages - pins.recent_pages))
            counts = self._budgets(layer, pages.flatten())[own][:, None]
            chosen[own] = self._pages(method, layer, step.of(own), counts, pinned, there)
        seen = chosen.repeat_interleave(size, -1)[..., : step.tokens]
        causal = torch.arange(step.tokens, device=step.q.device) < lengths[:, None]
        seen &= causal
        read = torch.stack((seen.sum((1, 2, 3)), causal.sum().expand(len(seen)) * heads), 1)
        self.read = read if self.read is None else self.read + read
        return seen

    def shares(self) -> list[float]:
        """Of the tokens there, what each choice read in the layers that are not dense."""
        return (self.read[:, 0] / self.read[:, 1]).tolist()

    def _budgets(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """Pages of each choice's heads in a layer, int64 [choices, new_tokens, 1], of rows of so many [new_tokens]."""
        fractions = [self.variants[one.method].fraction(one.fraction, layer, self.layers) for one in self.choices]
        key = tuple(fractions)
        if key not in self._counts:
            self._counts[key] = torch.tensor([
                [[self.variants[one.method].pages(fraction, count)] for count in pages.tolist()]
                for one, fraction in zip(self.choices, fractions)], device=pages.device)  # fmt: skip
        return self._counts[key]

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
        how = self.variants[method]
        if how.base in ("oracle", "kascade"):
            weights = torch.softmax(step.logits, dim=-1).double()
            weights = torch.nn.functional.pad(weights, (0, shape[-1] * self.page_size - step.tokens))
            scores = together(weights.unflatten(-1, (-1, self.page_size)).sum(-1), how)
            if how.base == "oracle":
                return listed(scores, counts, pinned, there, how)
            least = [kascade.budget(self.page_size).pages(int(count), how.pins) for count in there.sum(-1)]
            counts = counts.maximum(torch.tensor(least, device=counts.device)[:, None])
            self._anchors = top_pages(scores, counts, pinned, there)
            return self._anchors
        base = {"twilight": "mean_std"}.get(how.base, how.base.removesuffix("_8bit").removesuffix("_softmax"))
        logits = self._logits(base, layer, step, how).masked_fill(~there, -torch.inf)
        if how.base == "quest":
            return top_pages(logits.amax(2), counts, pinned, there)
        scores = together(torch.softmax(logits, dim=-1), how)
        if method != "twilight":
            return listed(scores, counts, pinned, there, how)
        first = top_pages(scores, counts.maximum(there.sum(-1, keepdim=True) // 4), pinned, there)
        weights = torch.softmax(logits.masked_fill(~first[:, :, None], -torch.inf), dim=-1).mean(2)
        return top_share(weights, twilight.SHARE, pinned) & first | pinned

    def _logits(self, kind: str, layer: int, step: LayerStep, how: Variant) -> torch.Tensor:
        """Of all pages by their summaries, float64 [choices, num_kv_heads, group_size, new_tokens, pages]; pages with
        new tokens are summarised as they are at each of these."""
        size, q = self.page_size, step.q.double()
        choices, heads, group, new, dim = q.shape
        before = step.keys.shape[1]
        whole, form, of_keys, of_last = before // size, RULES[kind].SUMMARY, None, None
        if how.weighted or how.spread:
            of_elements = weights_of(self.window_q[layer], heads)
            of_keys, of_last = of_elements[:, None, None], of_elements[:, None, None, None]
        if (summaries := self._kept.get(how.summaries)) is None:
            old_pages = step.keys[:, : whole * size].double().unflatten(1, (whole, size))
            summaries = self._kept[how.summaries] = summarize(old_pages, form, None, how, of_keys)
        tail = torch.cat((step.keys[None, :, whole * size :].expand(choices, -1, -1, -1), step.new_keys), 2).double()
        pages = -(-tail.shape[2] // size)
        tail = torch.nn.functional.pad(tail, (0, 0, 0, pages * size - tail.shape[2])).unflatten(2, (pages, size))
        lengths = torch.arange(before - whole * size + 1, before - whole * size + new + 1, device=q.device)
        valid = torch.arange(pages * size, device=q.device).view(pages, size) < lengths[:, None, None]
        last = summarize(tail[:, :, None].expand(-1, -1, new, -1, -1, -1), form, valid, how, of_last)
        if how.base.endswith("_8bit"):
            summaries, last = in_8_bits(summaries), in_8_bits(last)
        scale = dim**-0.5
        old = page_logits(kind, q.flatten(2, 3), summaries, scale).unflatten(2, (group, new))
        by_step = page_logits(kind, q.transpose(2, 3), last, scale).transpose(2, 3)
        return torch.cat((old, by_step), -1)


def weights_of(window_q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The root mean square of each element of a KV head's queries, float64 [num_kv_heads, head_dim], the same of both
    elements that a rotation turns together, since later queries are turned further."""
    squares = window_q.double().unflatten(0, (num_kv_heads, -1)).square().mean((1, 2))
    return squares.unflatten(-1, (-1, 2)).mean(-1).sqrt().repeat_interleave(2, -1)


def together(weights: torch.Tensor, how: Variant) -> torch.Tensor:
    """Of a group's query heads: [choices, num_kv_heads, group_size, new_tokens, pages] without the third."""
    return weights.amax(2) if how.largest else weights.mean(2)


def listed(scores: torch.Tensor, counts: torch.Tensor, pinned: torch.Tensor, there: torch.Tensor,
           how: Variant) -> torch.Tensor:  # fmt: skip
    """Pages of the largest scores [choices, num_kv_heads, new_tokens, pages] by a variant's budget."""
    if how.p is not None:
        return top_share(scores, how.p, pinned) & top_pages(scores, MOST_OF_TOP_P * counts, pinned, there) | pinned
    if not how.heads:
        return top_pages(scores, counts, pinned, there)
    heads = scores.shape[1]
    least = (-(-counts // 2)).maximum(pinned.sum(-1, keepdim=True))
    own = top_pages(scores, least, pinned, there).transpose(1, 2).flatten(2)
    found = top_pages(scores.transpose(1, 2).flatten(2), heads * counts[:, 0], own, there.repeat(1, heads))
    return found.unflatten(2, (heads, -1)).transpose(1, 2)


def top_share(weights: torch.Tensor, share: float, pinned: torch.Tensor) -> torch.Tensor:
    """rules.top_share as masks: weights [..., pages], pinned broadcasts to them."""
    order = weights.masked_fill(pinned, torch.inf).argsort(dim=-1, descending=True, stable=True)
    total = weights.gather(-1, order).cumsum(-1)
    before = torch.nn.functional.pad(total[..., :-1], (1, 0))
    taken = before < share * weights.sum(-1, keepdim=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, taken) | pinned
