"""Request traces: the paper's five families, its request files, and who owns which page.

Random draws are 32-bit MT19937 outputs modulo the range width, bit for bit what a CPU
torch.Generator of the same seed gives (arXiv 2606.26666 draws its traces that way).
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pkvsim.compiled import outer
from pkvsim.shapes import MAX_TOKENS, check_int

FAMILIES = ("uniform", "bimodal", "zipf", "bucketed", "homogeneous")
BUCKETS = (8192, 16384, 32768, 65536)
PAGE_SEED_OFFSET = 99  # the page shuffle has its own stream
UNUSED_PAGE = -1
MAX_SEED = 2**32 - 1  # of MT19937
MAX_REQUESTS = 10**6  # of a family: each is drawn one by one


class Draws:
    """A stream of MT19937 outputs."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)

    def outputs(self, count: int) -> np.ndarray:
        """The next `count` raw 32-bit outputs, uint64 [count]."""
        return self._bits.random_raw(count)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)


@dataclass(frozen=True, slots=True, eq=False)
class TraceStep:
    """One measured step: the active requests [rows] int64 and their lengths [rows] int32 (tokens)."""

    step: int
    request_ids: np.ndarray
    seq_lens: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in id order, and how they are served.

    prompt_tokens (whole pages), decode_tokens and arrival_steps are int64 [requests]. At each step the
    active rows are the first max_active requests, in id order, with 0 <= step - arrival < decode.
    """

    family: str
    seed: int
    prompt_tokens: np.ndarray
    decode_tokens: np.ndarray
    arrival_steps: np.ndarray
    max_active: int
    steps: int  # most steps to measure
    page_size: int

    @property
    def num_requests(self) -> int:
        return len(self.prompt_tokens)

    def reserved_pages(self) -> np.ndarray:
        """Pages that each request reserves for prompt and decode, int64 [requests]."""
        return -(-(self.prompt_tokens + self.decode_tokens) // self.page_size)

    def iter_steps(self) -> Iterator[TraceStep]:
        """The first `steps` steps that have an active row; idle steps are skipped and not counted."""
        ends = self.arrival_steps + self.decode_tokens
        step, measured = 0, 0
        while measured < self.steps:
            ids = np.flatnonzero((self.arrival_steps <= step) & (step < ends))[: self.max_active]
            if len(ids) == 0:
                later = self.arrival_steps[self.arrival_steps > step]
                if len(later) == 0:
                    return
                step = int(later.min())
                continue
            lens = self.prompt_tokens[ids] + (step - self.arrival_steps[ids])
            yield TraceStep(step, ids, lens.astype(np.int32))
            measured += 1
            step += 1


def make_trace(
    family: str,
    seed: int,
    prompt_tokens: list[int],
    decode_tokens: list[int],
    arrival_steps: list[int] | None,
    *,
    max_active: int,
    steps: int,
    page_size: int,
) -> Trace:
    """A Trace of these requests: prompts rounded up to whole pages, request i arriving at
    i // max_active where no arrivals are given."""
    max_active = check_int("max_active", max_active, 1, MAX_TOKENS)
    steps = check_int("steps", steps, 1, MAX_TOKENS)
    page_size = check_int("page_size", page_size, 1, MAX_TOKENS)
    prompts = -(-np.array(prompt_tokens, np.int64) // page_size) * page_size
    decodes = np.array(decode_tokens, np.int64)
    longest = int((prompts + decodes).max())
    if longest > MAX_TOKENS:
        raise ValueError(f"prompt_tokens: expected at most {MAX_TOKENS} tokens with decode, got {longest}")
    if arrival_steps is None:
        arrivals = np.arange(len(prompts), dtype=np.int64) // max_active
    else:
        arrivals = np.array(arrival_steps, np.int64)
    return Trace(
        family=family,
        seed=seed,
        prompt_tokens=prompts,
        decode_tokens=decodes,
        arrival_steps=arrivals,
        max_active=max_active,
        steps=steps,
        page_size=page_size,
    )


def paper_trace(
    family: str, seed: int, requests: int, max_active: int, steps: int, *, page_size: int = 16
) -> Trace:
    """A trace of one of the paper's families; the same seed gives the paper's own requests.

    Raises ValueError naming the argument.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    draws = Draws(check_int("seed", seed, 0, MAX_SEED))
    pairs = [_draw_request(family, index, draws) for index in range(check_int("requests", requests, 1, MAX_REQUESTS))]
    prompts, decodes = zip(*pairs)
    return make_trace(
        family, seed, list(prompts), list(decodes), None, max_active=max_active, steps=steps, page_size=page_size
    )


def _draw_request(family: str, index: int, draws: Draws) -> tuple[int, int]:
    """Prompt and decode tokens of request `index`; the prompt is drawn first."""
    if family == "uniform":
        return draws.between(4096, 32768), draws.between(16, 96)
    if family == "bimodal":
        if index % 4 == 0:
            return draws.between(24576, 65536), draws.between(32, 128)
        return draws.between(2048, 12288), draws.between(8, 64)
    if family == "zipf":
        rank = draws.between(1, 32)
        prompt = int(2048 + 65536 / math.sqrt(rank)) + draws.between(-512, 512)
        return max(1024, prompt), draws.between(8, 128)
    prompt = BUCKETS[index % len(BUCKETS)] if family == "bucketed" else 32768
    return prompt, draws.between(32, 96)


@dataclass(frozen=True, slots=True, eq=False)
class PageAssignment:
    """Physical pages of every request: request i owns page_ids[offsets[i] : offsets[i + 1]]."""

    num_pages: int  # pages in the pool, holes included
    offsets: np.ndarray  # [requests + 1] int64
    page_ids: np.ndarray  # [reserved pages] int32, all distinct

    def block_table(self, request_ids: np.ndarray) -> np.ndarray:
        """Block table int32 [rows, max_pages] of these requests; unused entries are UNUSED_PAGE."""
        counts = self.offsets[request_ids + 1] - self.offsets[request_ids]
        table = np.full((len(request_ids), int(counts.max(initial=0))), UNUSED_PAGE, np.int32)
        for row, request in enumerate(request_ids):
            table[row, : counts[row]] = self.page_ids[self.offsets[request] : self.offsets[request + 1]]
        return table


def pool_pages(trace: Trace, hole_fraction: float) -> int:
    """Pages of a pool of which hole_fraction, in [0, 1), belongs to nobody."""
    if not 0 <= hole_fraction < 1:
        raise ValueError(f"hole_fraction: expected a number in [0, 1), got {hole_fraction!r}")
    return math.ceil(int(trace.reserved_pages().sum()) / (1 - hole_fraction))


def assign_pages(trace: Trace, *, hole_fraction: float = 0.0) -> PageAssignment:
    """Shuffles the pool's pages from seed + 99 and deals them out in request order."""
    num_pages = pool_pages(trace, hole_fraction)
    order = np.arange(num_pages, dtype=np.int32)
    _shuffle(order, Draws(trace.seed + PAGE_SEED_OFFSET).outputs(num_pages))
    offsets = np.zeros(trace.num_requests + 1, np.int64)
    np.cumsum(trace.reserved_pages(), out=offsets[1:])
    return PageAssignment(num_pages, offsets, order[: offsets[-1]].copy())


@outer
def _shuffle(order: np.ndarray, outputs: np.ndarray) -> None:
    """Fisher-Yates in place: position i swaps with i + output % (n - i). order int32, outputs uint64 [n]."""
    n = len(order)
    for i in range(n):
        j = i + np.int64(outputs[i]) % (n - i)
        order[i], order[j] = order[j], order[i]
