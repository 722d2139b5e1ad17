"""A long life: requests in bursts beyond memory, overlong ones, cancellations; all end and their pages come back."""
from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
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
    first bursts have gone; None where it was cut short before that."""

    requests: int  # that came
    asked: int  # to come
    ended: dict[str, int]  # by status
    cancelled_at_cut: int  # of those, as it was cut short
    preemptions: int  # for want of pages
    tokens: int
    seconds: float
    lost_pages: int  # that are not free when no request is left
    growth_bytes: tuple[int, int] | None
    cut_short: bool

    @property
    def sound(self) -> bool:
        """Whether every request that came has ended, every page is back and memory, as far as known, has stayed."""
        ended = sum(self.ended.values()) == self.requests
        return ended and self.lost_pages == 0 and max(self.growth_bytes or (0,)) <= SLACK_BYTES

    def __str__(self) -> str:
        cut = (f"CUT SHORT after {self.requests:,} of {self.asked:,} requests, of which {self.cancelled_at_cut:,} were "
               f"cancelled then: " if self.cut_short else "")
        grown = ("peaks not compared, as memory had not settled" if self.growth_bytes is None else
                 f"peaks grew by {[count >> 20 for count in self.growth_bytes]} MiB (host, GPU)")
        return (f"{cut}{self.requests:,} requests in {self.seconds:.0f} s, {self.tokens:,} tokens: {self.ended}, "
                f"{self.preemptions:,} preemptions, {self.lost_pages} pages lost, {grown}")


def soak(llm: LLM, requests: int, *, seed: int = 0, stopped: Callable[[], bool] = lambda: False) -> SoakResult:
    """Serves so many requests. Their server must not record its steps, whose records would grow. stopped: asked between
    steps; from when it says True no more come, and those that have not ended are cancelled."""
    server, rng = llm.server, np.random.default_rng(seed)
    head = rng.integers(0, llm.config.vocab_size, HEAD)
    ended: Counter[str] = Counter()
    tokens, begin, came, preemptions, cancelled, cut = 0, time.perf_counter(), 0, 0, 0, False
    sizes = [min(BURST, requests - at) for at in range(0, requests, BURST)]
    settled: tuple[int, int] | None = None
    for number, size in enumerate(tracked(sizes, "bursts", lambda size: f"{size} requests")):
        if cut or stopped():
            cut = True
            break
        waiting = [server.add_request(*_drawn(llm, rng, head)) for _ in range(size)]
        came += size
        doomed = [request for request in waiting if rng.random() < CANCELLED_SHARE]
        while server.has_work:
            if not cut and stopped():
                cut = True
                cancelled = sum(server.cancel(request) for request in server.unfinished())
            if doomed and rng.random() < 0.2:
                server.cancel(doomed.pop())
            for event in server.step():
                tokens += len(event.tokens)
                if event.ended:
                    ended[event.request.status] += 1
                    preemptions += event.request.preemptions
        if settled is None and not cut and number + 1 >= SETTLED * len(sizes):
            settled = _peaks()
    growth = None if settled is None else tuple(now - then for now, then in zip(_peaks(), settled))
    return SoakResult(
        requests=came, asked=requests, ended=dict(ended), cancelled_at_cut=cancelled, preemptions=preemptions,
        tokens=tokens, seconds=time.perf_counter() - begin,
        lost_pages=server.scheduler.limits.num_pages - server.num_free_pages, growth_bytes=growth, cut_short=cut,
    )  # fmt: skip


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
