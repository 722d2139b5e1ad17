"""What a step is given, what it gives, and the record of one that has run; how a request samples. Needs no torch."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import numpy as np

from pkvsim.serving.live.live_step import LiveStep
from pkvsim.shapes import MAX_TOKENS, check_int

MAX_TEMPERATURE = 1e6  # draws are uniform long before, and their float32 sums stay far from infinity
LIKELIEST, DRAWN, FROM_NUCLEUS = range(3)  # how a token is chosen; by a top_p below 1 it comes from a nucleus


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Raises ValueError naming the field.

    temperature 0 takes the likeliest token. Otherwise a token is drawn from softmax(logits / temperature), cut to the
    fewest likeliest tokens that have at least top_p of it together. Draws depend on the seed and the token's position
    alone, not on which other requests run.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end-of-sequence tokens
    ignore_eos: bool = False  # neither those nor the model's end it

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_int("seed", self.seed, 0, 2**63 - 1)
        if not is_number(self.temperature) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature: expected a number in [0, {MAX_TEMPERATURE:g}], got {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        try:
            stops = tuple(check_int("stop_token_ids", token, 0, MAX_TOKENS) for token in self.stop_token_ids)
        except TypeError:
            raise ValueError(f"stop_token_ids: expected token ids, got {self.stop_token_ids!r}") from None
        object.__setattr__(self, "stop_token_ids", stops)

    @property
    def choice(self) -> int:
        """LIKELIEST, DRAWN or FROM_NUCLEUS."""
        return LIKELIEST if not self.temperature else DRAWN if self.top_p == 1 else FROM_NUCLEUS


def is_number(value: Any) -> bool:
    """Whether value is a real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Prompt tokens of one row: `tokens` [n] int32 from position begin on, behind what is cached.

    ends: whether the row's next token follows from them. page_ids: all pages of the row, in order of its tokens.
    """

    slot: int
    begin: int
    tokens: np.ndarray
    ends: bool
    page_ids: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class SlotSampling:
    """How the row in a slot samples from now on."""

    slot: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """A step, by slots: places of a running request in the device's tables, [0, max_batch).

    Tokens come in the order of decode_slots, then one for each chunk that ends.
    """

    decode_slots: np.ndarray  # [rows] int32; each decodes from the token that the device gave it last
    decode_lens: np.ndarray  # [rows] int32, tokens in cache, the one decoded from included
    chunks: list[Chunk]
    page_slots: np.ndarray  # [pages] int32: table[page_slots[i], page_columns[i]] = page_ids[i], before the step
    page_columns: np.ndarray  # [pages] int32
    page_ids: np.ndarray  # [pages] int32
    sampling: list[SlotSampling] = field(default_factory=list)  # of slots that are taken with this step
    choice: int = LIKELIEST  # the most that any of its tokens asks for

    @property
    def num_outputs(self) -> int:
        return len(self.decode_slots) + sum(chunk.ends for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode_slots) + sum(len(chunk.tokens) for chunk in self.chunks)


class Running(Protocol):
    """What a step needs to know of a request."""

    prompt: np.ndarray  # [tokens] int32
    tokens: list[int]  # generated
    slot: int | None


def step_inputs(
    plan: LiveStep, requests: Mapping[int, Running], pages_of: Callable[[int], list[int]], *,
    sampling: list[SlotSampling], choice: int,
) -> StepInputs:  # fmt: skip
    """A planned step by slots, which all that it runs have. pages_of: of a running request, by its key."""
    chunks = []
    for key, begin, count, ends in zip(plan.prefill.tolist(), plan.prefill_begins.tolist(),
                                       plan.prefill_tokens.tolist(), plan.ends.tolist()):
        tokens = _tokens_of(requests[key], begin, begin + count)
        chunks.append(Chunk(requests[key].slot, begin, tokens, ends, pages_of(key)))
    counts = [len(new.page_ids) for new in plan.new_pages]
    new_slots = [requests[new.request].slot for new in plan.new_pages]
    return StepInputs(
        decode_slots=np.array([requests[key].slot for key in plan.decode.tolist()], np.int32),
        decode_lens=plan.decode_lens.astype(np.int32),
        chunks=chunks,
        page_slots=np.repeat(np.array(new_slots, np.int32), counts),
        page_columns=_joined([np.arange(new.first, new.first + len(new.page_ids)) for new in plan.new_pages]),
        page_ids=_joined([np.array(new.page_ids, np.int64) for new in plan.new_pages]),
        sampling=sampling,
        choice=choice,
    )


def _tokens_of(request: Running, begin: int, end: int) -> np.ndarray:
    """Tokens [begin, end) of the prompt and what was generated since, int32: of a preempted request both are computed
    anew. Those generated are all read by then, as it ran last two steps ago or earlier."""
    prompt = request.prompt
    if end <= len(prompt):
        return prompt[begin:end]
    generated = np.array(request.tokens[max(0, begin - len(prompt)) : end - len(prompt)], np.int32)
    return np.concatenate([prompt[begin:], generated])


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32) if arrays else np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step ran on the device, in us from a common start; and how many rows it ran with padding."""

    start_us: float
    end_us: float
    padded_rows: int


class LaunchedStep(Protocol):
    """A step that may still run."""

    def wait(self) -> np.ndarray:
        """The tokens, int64 [num_outputs], once they are there."""

    def times(self) -> StepTimes:
        """Once wait() has returned."""


class StepRunner(Protocol):
    """What executes steps, in order."""

    def launch(self, inputs: StepInputs) -> LaunchedStep:
        """Begins a step, and need not wait for its end."""

    def now_us(self) -> float:
        """The host's clock, of which StepTimes are readings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLaunch:
    """What a server knew of itself when it had launched a step."""

    running: int
    waiting: int
    pages: int  # in use, those of blocks that are only kept not among them
    plan_us: float  # of the host, from the start of planning to the end of launching
    follows: bool  # there was work when the step before ended, so that the device should not have waited


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """A step that has run. Times in us, of the device where there is one; `running` to `follows` are AtLaunch's."""

    start_us: float
    end_us: float
    kind: str  # "decode", "prefill" or "mixed"
    decode_rows: int
    padded_rows: int
    context_tokens: int  # that the decoding rows attended to
    prefill_tokens: int
    prefill_context: int  # cached before the chunks, of all of them together
    chunks: int
    running: int
    waiting: int
    pages: int
    preempted: int
    plan_us: float
    follows: bool
    decode_lens: np.ndarray  # [decode_rows] int64, tokens that each row attended to
    chunk_begins: np.ndarray  # [chunks] int64, tokens cached before each
    chunk_tokens: np.ndarray  # [chunks] int64


def step_record(plan: LiveStep, at_launch: AtLaunch, times: StepTimes) -> StepRecord:
    """The record of a step that ran as planned."""
    rows, chunks = len(plan.decode), len(plan.prefill)
    return StepRecord(
        start_us=times.start_us, end_us=times.end_us, kind="decode" if not chunks else "mixed" if rows else "prefill",
        decode_rows=rows, padded_rows=times.padded_rows, context_tokens=int(plan.decode_lens.sum()),
        prefill_tokens=int(plan.prefill_tokens.sum()), prefill_context=int(plan.prefill_begins.sum()), chunks=chunks,
        running=at_launch.running, waiting=at_launch.waiting, pages=at_launch.pages, preempted=len(plan.preempted),
        plan_us=at_launch.plan_us, follows=at_launch.follows, decode_lens=plan.decode_lens,
        chunk_begins=plan.prefill_begins, chunk_tokens=plan.prefill_tokens,
    )  # fmt: skip
