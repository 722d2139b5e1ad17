"""KL of next-token distributions over the dense model's, and answers to hidden needles."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from study.choosers import Choice, PageChooser
from study.evictions import Evictions, Kept
from study.llama import Chooser, LayerStep, Llama
from study.texts import Context, Needle


@dataclass(frozen=True, slots=True)
class Finding:
    """One method at one budget on one text."""

    what: str  # "retrieval", "needle", "needle loss", "eviction", "evicted needle"
    method: str
    fraction: float
    tokens: int
    value: float  # nats, or 1 for a right answer; of losses the mean negative log likelihood of the answer
    read: float  # share of the tokens that were read


def kl_nats(dense: torch.Tensor, other: torch.Tensor) -> float:
    """KL(dense || other) of logits [steps, vocabulary], mean over the steps."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def readers(*parts: tuple[int, Chooser | None]) -> Chooser:
    """One chooser of parts that follow one another: (variants, chooser), None where they see everything."""

    def choose(layer: int, step: LayerStep) -> torch.Tensor:
        found, begin = [], 0
        for count, own in parts:
            some = step.of(slice(begin, begin + count))
            begin += count
            seen = some.logits[:, :, 0] > -torch.inf  # what is causal
            found.append(seen if own is None else seen & own(layer, some))
        return torch.cat(found)

    return choose


def retrieval(model: Llama, context: Context, methods: tuple[str, ...], fractions: tuple[float, ...],
              window_q: list[torch.Tensor] | None = None) -> list[Finding]:  # fmt: skip
    """The mean KL over the steps after a context, by method and budget. window_q: queries of another text by layer, for
    methods that weigh elements by them."""
    cache = model.prefill(context.ids)
    choices = [Choice(method, fraction) for method in methods for fraction in fractions]
    chooser = PageChooser(choices, layers=model.layers, window_q=window_q)
    logits = model.block(context.following, cache, readers((1, None), (len(choices), chooser)),
                         variants=1 + len(choices))  # fmt: skip
    return [Finding("retrieval", *choice, len(context.ids), kl_nats(logits[0], own), read)
            for choice, own, read in zip(choices, logits[1:], chooser.shares())]


def find_needle(model: Llama, needle: Needle, methods: tuple[str, ...], evictions: tuple[str, ...],
                fractions: tuple[float, ...], eviction_fractions: tuple[float, ...],
                window_q: list[torch.Tensor] | None = None) -> list[Finding]:  # fmt: skip
    """Answers of the dense model, of steps that read chosen pages, and after evictions made before the question."""
    cache, tokens = model.prefill(needle.ids, masses=bool(evictions)), len(needle.ids)
    choices = [Choice(method, fraction) for method in methods for fraction in fractions]
    cuts = [Choice(method, fraction) for method in evictions for fraction in eviction_fractions]
    chooser = PageChooser(choices, layers=model.layers, window_q=window_q)
    parts: list[tuple[int, Chooser | None]] = [(1, None), (len(choices), chooser)]
    if cuts:
        evicted = Evictions(model, cache)
        parts.append((len(cuts), Kept([evicted.kept(*cut) for cut in cuts], tokens, model.device)))
    logits = model.block(needle.question + needle.answer[:-1], cache, readers(*parts),
                         variants=1 + len(choices) + len(cuts), last=len(needle.answer))  # fmt: skip
    answer = torch.tensor(needle.answer, device=logits.device)
    right = (logits.argmax(-1) == answer).all(-1).tolist()
    chosen = torch.log_softmax(logits.double(), -1).gather(-1, answer[None, :, None].expand(len(logits), -1, 1))
    losses = (-chosen).mean((1, 2)).tolist()
    found = []
    for own, read, hit, loss in zip([Choice("dense", 1.0), *choices], [1.0, *chooser.shares()], right, losses):
        found += [Finding("needle", *own, tokens, hit, read), Finding("needle loss", *own, tokens, loss, read)]
    if cuts:
        found += [Finding("eviction", "dense", 1.0, tokens, losses[0], 1.0),
                  Finding("evicted needle", "dense", 1.0, tokens, right[0], 1.0)]
    for cut, hit, loss in zip(cuts, right[1 + len(choices) :], losses[1 + len(choices) :]):
        found += [Finding("eviction", *cut, tokens, loss, cut.fraction),
                  Finding("evicted needle", *cut, tokens, hit, cut.fraction)]
    return found


@dataclass(frozen=True, slots=True)
class Order:
    """Whether one method's loss is below another's, text by text."""

    better: str
    worse: str
    texts: int
    difference: float  # nats, mean of better - worse
    low: float  # 95 % of the bootstrap's means
    high: float
    wins: int  # texts where it is below

    @property
    def verdict(self) -> str:
        """seen or refuted where the interval has one sign, else open"""
        return "seen" if self.high < 0 else "refuted" if self.low > 0 else "open"


def order(findings: list[Finding], better: str, worse: str, fraction: float, *, resamples: int = 10_000) -> Order:
    """Of the losses after evictions that keep `fraction`: the paired difference with its percentile bootstrap over the
    texts."""
    losses = {method: [one.value for one in findings if (one.what, one.method, one.fraction) == (
        "eviction", method, fraction)] for method in (better, worse)}  # fmt: skip
    differences = np.subtract(losses[better], losses[worse])
    picks = np.random.default_rng(0).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(axis=1), (0.025, 0.975))
    return Order(better, worse, len(differences), float(differences.mean()), float(low), float(high),
                 int((differences < 0).sum()))


def summary(findings: list[Finding]) -> dict[tuple[str, str, float], float]:
    """Means over the texts, by (what, method, fraction)."""
    groups: dict[tuple[str, str, float], list[float]] = {}
    for one in findings:
        groups.setdefault((one.what, one.method, one.fraction), []).append(float(one.value))
    return {key: float(np.mean(values)) for key, values in groups.items()}
