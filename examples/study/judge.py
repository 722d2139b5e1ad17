"""KL of next-token distributions over the dense model's, and answers to hidden needles."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from study.choosers import PageChooser, chooser
from study.evictions import Kept, kept_tokens
from study.llama import Cache, Chooser, Llama
from study.texts import Context, Needle


@dataclass(frozen=True, slots=True)
class Finding:
    """One method at one budget on one text."""

    what: str  # "retrieval", "needle", "eviction"
    method: str
    fraction: float
    tokens: int
    value: float  # nats, or 1 for a right answer; of "eviction" the mean negative log likelihood of the answer
    read: float  # share of the tokens that were read


def kl_nats(dense: torch.Tensor, other: torch.Tensor) -> float:
    """KL(dense || other) of logits [vocabulary]."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (dense, other))
    return float((p.exp() * (p - q)).sum())


def steps(model: Llama, cache: Cache, ids: list[int], choose: Chooser | None) -> list[torch.Tensor]:
    """Logits after each of these tokens; the cache is as long as before afterwards."""
    length = cache.length
    found = [model.decode(token, cache, choose) for token in ids]
    cache.cut(length)
    return found


def retrieval(model: Llama, context: Context, methods: tuple[str, ...], fractions: tuple[float, ...]) -> list[Finding]:
    """The mean KL over the steps after a context, by method and budget."""
    _, cache = model.prefill(context.ids, len(context.following))
    dense = steps(model, cache, context.following, None)
    found = []
    for method in methods:
        for fraction in fractions:
            choose = chooser(method, fraction)
            values = [kl_nats(a, b) for a, b in zip(dense, steps(model, cache, context.following, choose))]
            mean = float(np.mean(values))
            found.append(Finding("retrieval", method, fraction, len(context.ids), mean, share(choose)))
    return found


def share(choose: object) -> float:
    return float(choose.read[0] / max(1, choose.read[1])) if isinstance(choose, PageChooser) else 1.0


def answers(model: Llama, needle: Needle, cache: Cache, choose: Chooser | None) -> tuple[bool, float]:
    """Whether the model writes the needle's number, and the mean negative log likelihood of its tokens, nats."""
    logits = steps(model, cache, needle.question + needle.answer[:-1], choose)[-len(needle.answer) :]
    right = all(int(row.argmax()) == token for row, token in zip(logits, needle.answer))
    losses = [-float(torch.log_softmax(row.double(), -1)[token]) for row, token in zip(logits, needle.answer)]
    return right, float(np.mean(losses))


def find_needle(model: Llama, needle: Needle, methods: tuple[str, ...], evictions: tuple[str, ...],
                fractions: tuple[float, ...], eviction_fractions: tuple[float, ...]) -> list[Finding]:
    """Answers of the dense model, of steps that read chosen pages, and after evictions made before the question."""
    _, cache = model.prefill(needle.ids, len(needle.question) + len(needle.answer))
    tokens = len(needle.ids)
    right, loss = answers(model, needle, cache, None)
    found = [Finding("needle", "dense", 1.0, tokens, right, 1.0), Finding("eviction", "dense", 1.0, tokens, loss, 1.0),
             Finding("evicted needle", "dense", 1.0, tokens, right, 1.0)]
    for method in methods:
        for fraction in fractions:
            choose = chooser(method, fraction)
            right, _ = answers(model, needle, cache, choose)
            found.append(Finding("needle", method, fraction, tokens, right, share(choose)))
    for method in evictions:
        for fraction in eviction_fractions:
            kept = Kept(kept_tokens(method, model, cache, fraction), tokens, model.device)
            right, loss = answers(model, needle, cache, kept)
            found += [Finding("eviction", method, fraction, tokens, loss, fraction),
                      Finding("evicted needle", method, fraction, tokens, right, fraction)]
    return found


def summary(findings: list[Finding]) -> dict[tuple[str, str, float], float]:
    """Means over the texts, by (what, method, fraction)."""
    groups: dict[tuple[str, str, float], list[float]] = {}
    for one in findings:
        groups.setdefault((one.what, one.method, one.fraction), []).append(float(one.value))
    return {key: float(np.mean(values)) for key, values in groups.items()}
