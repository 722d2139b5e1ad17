"""A long life: requests in bursts beyond memory, overlong ones, cancellations; all end and their pages come back."""
from __future__ import annotations

import resource
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu.measure.progress import tracked

if TYPE_CHECKING:
    from gpu.serve.llm import LLM

BURST = 200  # requests that come at once
CANCELLED_SHARE, OVERLONG_SHARE, DRAWN_SHARE = 0.15, 0.05, 0.3
PROMPTS, OUTPUTS, HEAD = (1, 300), (1, 60), 200  # tokens, [from, to); of the head that prompts share a part of
SETTLED = 0.3  # of the bursts, after which memory must not grow
SLACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SoakResult:
    """What became of the requests. growth_bytes: of the process's peak and of PyTorch's peak on the GPU, from when the
    first bursts have gone."""

    requests: int
    ended: dict[str, int]  # by status
    tokens: int
    seconds: float
    lost_pages: int
    growth_bytes: tuple[int, int]

    @property
    def sound(self) -> bool:
        """Whether every request has ended, every page is back and memory has stayed."""
        ended = sum(self.ended.values()) == self.requests
        return ended and self.lost_pages == 0 and max(self.growth_bytes) <= SLACK_BYTES


def soak(llm: LLM, requests: int, *, seed: int = 0) -> SoakResult:
    """Serves so many requests. Their server must not record its steps, whose records would grow."""
    server, rng = llm.server, np.random.default_rng(seed)
    head = rng.integers(0, llm.config.vocab_size, HEAD)
    ended: Counter[str] = Counter()
    tokens, begin = 0, time.perf_counter()
    sizes = [min(BURST, requests - at) for at in range(0, requests, BURST)]
    settled: tuple[int, int] | None = None
    for number, size in enumerate(tracked(sizes, "bursts", lambda size: f"{size} requests")):
        waiting = [server.add_request(*_drawn(llm, rng, head)) for _ in range(size)]
        doomed = [request for request in waiting if rng.random() < CANCELLED_SHARE]
        while server.has_work:
            if doomed and rng.random() < 0.2:
                server.cancel(doomed.pop())
            for event in server.step():
                tokens += len(event.tokens)
                if event.ended:
                    ended[event.request.status] += 1
        if settled is None and number >= SETTLED * len(sizes):
            settled = _peaks()
    settled = settled or _peaks()
    growth = tuple(now - then for now, then in zip(_peaks(), settled))
    return SoakResult(requests, dict(ended), tokens, time.perf_counter() - begin,
                      server.scheduler.limits.num_pages - server.num_free_pages, growth)


def _drawn(llm: LLM, rng: np.random.Generator, head: np.ndarray) -> tuple[np.ndarray, Any]:
    """A prompt and how it samples."""
    from gpu.serve.step import SamplingParams

    own = rng.integers(0, llm.config.vocab_size, int(rng.integers(*PROMPTS)))
    prompt = np.concatenate([head[: int(rng.integers(0, HEAD))], own])
    if rng.random() < OVERLONG_SHARE:
        prompt = np.resize(prompt, llm.server.max_context)
    drawn = rng.random() < DRAWN_SHARE
    return prompt, SamplingParams(max_tokens=int(rng.integers(*OUTPUTS)), temperature=0.8 if drawn else 0.0,
                                  top_p=0.9 if drawn else 1.0, seed=int(rng.integers(1 << 30)))


def _peaks() -> tuple[int, int]:
    """(peak of the process, peak of PyTorch's allocations on the GPU), bytes."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, gpu
