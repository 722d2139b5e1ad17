"""A session over long documents: questions about documents that come again and again, on a model with a PagedCache."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpu.cache.prompts.prompt_pool import PromptPool
from gpu.drop_ins.transformers_cache import PagedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a session, in tokens."""

    documents: int
    document_tokens: int
    question_tokens: int = 32
    answer_tokens: int = 16
    page_size: int = 16

    @property
    def most_tokens(self) -> int:
        return self.document_tokens + self.question_tokens + self.answer_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What one question took. loaded: tokens of its prompt that were not computed; seconds from asking to the first
    token, and of each further one; first_logits [vocabulary] float32 on the host."""

    document: int
    again: bool
    loaded: int
    ttft_s: float
    token_s: float
    tokens: tuple[int, ...]
    first_logits: torch.Tensor


class Session:
    """One server: a model, the pages of one conversation, and the pool behind them, if any."""

    def __init__(self, model: PreTrainedModel, shape: Shape, pool: PromptPool | None, *, seed: int = 0) -> None:
        self.model, self.shape = model, shape
        self.cache = PagedCache(model.config, max_batch_size=1, max_seq_len=shape.most_tokens,
                                page_size=shape.page_size, tiers=pool)  # fmt: skip
        self._generator = torch.Generator().manual_seed(seed)
        self._documents = self._random(shape.documents, shape.document_tokens)
        self._asked: set[int] = set()

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randint(3, self.model.config.vocab_size, size, generator=self._generator)

    @torch.no_grad()
    def ask(self, document: int, question: torch.Tensor) -> Answer:
        """The answer to a question [question_tokens] about a document."""
        prompt = torch.cat([self._documents[document], question])[None].to(self.model.device)
        self._wait()
        begin = time.perf_counter()
        loaded = self.cache.begin(self.model, prompt) if self.cache.tiers is not None else 0
        logits = self._step(prompt[:, loaded:], loaded)
        tokens = [int(logits.argmax())]  # waits for the GPU
        first_s = time.perf_counter()
        first_logits = logits.float().cpu()
        for _ in range(self.shape.answer_tokens - 1):
            at = prompt.shape[1] + len(tokens) - 1
            tokens.append(int(self._step(torch.tensor([tokens[-1:]], device=self.model.device), at).argmax()))
        end_s = time.perf_counter()
        if self.cache.tiers is not None:
            self.cache.keep(torch.cat([prompt.cpu(), torch.tensor([tokens])], 1))
        self.cache.reset()
        again = document in self._asked
        self._asked.add(document)
        token_s = (end_s - first_s) / max(1, len(tokens) - 1)
        return Answer(document, again, loaded, first_s - begin, token_s, tuple(tokens), first_logits)

    def question(self) -> torch.Tensor:
        """Another one."""
        return self._random(self.shape.question_tokens)

    def _step(self, ids: torch.Tensor, begin: int) -> torch.Tensor:
        """Logits [vocabulary] of the last of these tokens, which stand at `begin` of their sequence."""
        positions = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
        out = self.model(ids, position_ids=positions, logits_to_keep=1, **self.cache.argument_of(self.model))
        return out.logits[0, -1]

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def order_of(documents: int, questions: int, seed: int) -> list[int]:
    """Which document each question is about: every one once, then some far more often than others."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, documents + 1)
    often = rng.choice(documents, max(0, questions - documents), p=weights / weights.sum())
    return [*range(min(documents, questions)), *often.tolist()]


def run(
    model: PreTrainedModel, shape: Shape, pool: PromptPool | None, order: Sequence[int], *, seed: int = 0
) -> list[Answer]:  # fmt: skip
    """The answers to questions about these documents, the same ones for a seed, with a pool or without."""
    session = Session(model, shape, pool, seed=seed)
    return [session.ask(document, session.question()) for document in order]


def largest_difference(found: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """Of the first tokens' logits, as a share of their standard deviation; NaN where one of them is."""
    return float(np.max([float((one.first_logits - other.first_logits).abs().max() / other.first_logits.std())
                         for one, other in zip(found, expected)]))  # fmt: skip
