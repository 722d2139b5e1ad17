"""The loop: requests in, tokens out, a step at a time.

    server.add_request(prompt, params)
    while server.has_work:
        for event in server.step():
            ...                              # event.tokens are new; event.ended: event.request.status says how

A step is planned and launched while the one before still runs, whose tokens are read then: the host's work hides behind
the device's. So a request that ends with an end-of-sequence token is found out one step late, and the token that it
has computed by then is dropped. Every request ends: served, refused with a reason, or cancelled; also where a step
fails, after which the server goes on with an empty cache.
"""
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from gpu.serve.step import (
    GREEDY,
    LIKELIEST,
    AtLaunch,
    LaunchedStep,
    SamplingParams,
    SlotSampling,
    StepInputs,
    StepRecord,
    StepRunner,
    step_inputs,
    step_record,
)
from gpu.serve.tiers.prompt_tiers import PromptTiers
from pkvsim.serving.live.live_scheduler import LiveScheduler
from pkvsim.serving.live.live_step import LiveStep
from pkvsim.serving.state import Limits

WAITING, RUNNING, SERVED, REFUSED, CANCELLED = "waiting", "running", "served", "refused", "cancelled"
ENDED = (SERVED, REFUSED, CANCELLED)


@dataclass(slots=True, eq=False)
class Request:
    """A request and what has become of it. Times are readings of the runner's clock, in us."""

    id: int
    prompt: np.ndarray  # [tokens] int32
    params: SamplingParams
    arrival_us: float
    tokens: list[int] = field(default_factory=list)  # generated
    token_us: list[float] = field(default_factory=list)  # when the host had each
    status: str = WAITING
    reason: str | None = None  # why it was refused or a step failed; "stop" or "length" of one that was served
    first_run_us: float | None = None
    end_us: float | None = None
    hit_tokens: int = 0  # of the prompt, found in the prefix cache or on tiers when it first ran
    preemptions: int = 0
    slot: int | None = None  # while it runs


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """New tokens of a request, or its end, or both; after the event that says so there is none of this request."""

    request: Request
    tokens: list[int]
    ended: bool


@dataclass(slots=True, eq=False)
class _InFlight:
    launched: LaunchedStep
    outputs: list[Request]
    plan: LiveStep
    at_launch: AtLaunch


class Server:
    """Serves requests in one thread: nothing here may be called by two at once."""

    __slots__ = ("runner", "scheduler", "max_context", "vocab_size", "eos_token_ids", "steps", "_requests", "_ended",
                 "_in_flight", "_free_slots", "_next_id", "_driver", "_tiers")

    def __init__(self, runner: StepRunner, limits: Limits, *, max_context: int, vocab_size: int,
                 eos_token_ids: Sequence[int] = (), record: bool = False, tiers: PromptTiers | None = None) -> None:
        """max_context: most tokens of a prompt and its output. record: keeps a StepRecord of each step in `steps`.
        tiers: where prompts' KV is kept beyond the pages."""
        self.runner, self.scheduler, self._tiers = runner, LiveScheduler(limits, tiers), tiers
        self.max_context, self.vocab_size, self.eos_token_ids = max_context, vocab_size, frozenset(eos_token_ids)
        self.steps: list[StepRecord] | None = [] if record else None
        self._requests: dict[int, Request] = {}  # that have not ended
        self._ended: list[Request] = []  # to be told of by the next step
        self._in_flight: deque[_InFlight] = deque()
        self._free_slots = _all_slots(limits)
        self._next_id = 0
        self._driver = threading.Lock()

    @contextmanager
    def driven_by(self, caller: str) -> Iterator[None]:
        """Within it the server is the caller's alone. RuntimeError where another one has it, since two threads that
        step one server would mix its requests up."""
        if not self._driver.acquire(blocking=False):
            raise RuntimeError(f"{caller}: expected a server that nobody else drives, got one under generate() or an "
                               "AsyncLLM")
        try:
            yield
        finally:
            self._driver.release()

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do or to tell."""
        return bool(self._requests or self._ended or self._in_flight)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def unfinished(self) -> list[Request]:
        """Requests that have not ended, in order of their ids."""
        return list(self._requests.values())

    @property
    def num_free_pages(self) -> int:
        """Pages that no request uses; the prefix cache may hold some of them."""
        return self.scheduler.limits.num_pages - self._used_pages()

    def add_request(self, prompt: Sequence[int] | np.ndarray, params: SamplingParams = GREEDY, *,
                    arrival_us: float | None = None) -> Request:
        """Takes a request of token ids in. One that can never run comes back refused, with the reason. ValueError where
        params are none."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params: expected SamplingParams, got {params!r}")
        now_us = self.runner.now_us()
        try:
            ids = np.asarray(prompt)
        except (ValueError, TypeError):  # lists of several lengths, tensors on a GPU
            ids = np.array(None)
        request = Request(self._next_id, ids, params, now_us if arrival_us is None else arrival_us)
        self._next_id += 1
        request.reason = self._refusal(ids, params)
        if request.reason is None:
            request.prompt = ids.astype(np.int32)
            self.scheduler.add(request.id, prompt=request.prompt, output_tokens=params.max_tokens, now_us=now_us)
            self._requests[request.id] = request
        else:
            self._end(request, REFUSED, now_us)
        return request

    def _refusal(self, ids: np.ndarray, params: SamplingParams) -> str | None:
        if ids.shape == (0,):
            return "prompt: expected token ids, at least one, got none"
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            return f"prompt: expected token ids, at least one, got {ids.dtype} {list(ids.shape)}"
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            return f"prompt: expected token ids in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}"
        total = len(ids) + params.max_tokens
        if total > self.max_context:
            return f"prompt: expected at most {self.max_context} tokens with its output, got {total}"
        needed, pages = self.scheduler.pages_needed(len(ids), params.max_tokens), self.scheduler.limits.num_pages
        return None if needed <= pages else f"prompt: expected at most {pages} pages with its output, got {needed}"

    def cancel(self, request: Request) -> bool:
        """Ends a request, wherever it stands; False where it had ended. Its pages are free at once."""
        if request.id not in self._requests:
            return False
        self._leave(request)
        self._end(request, CANCELLED, self.runner.now_us())
        return True

    def step(self) -> list[Event]:
        """Plans and launches a step, and reads the tokens of the one before.

        What the runner raises comes through, also KeyboardInterrupt. All requests are cancelled by then, with the
        reason, and the next step tells of it: what the failed one has written of its pages nobody knows.
        """
        try:
            return self._step()
        except BaseException as error:
            self._abandon(f"a step failed: {type(error).__name__}: {error}")
            raise

    def _step(self) -> list[Event]:
        launched = self.scheduler.has_work and self._launch()
        events = []
        while len(self._in_flight) > (1 if launched and self.scheduler.has_work else 0):
            events += self._collect()
        if self._tiers is not None and self._tiers.is_waiting and not launched:
            self._tiers.pause()
        events += [Event(request, [], True) for request in self._ended]
        self._ended.clear()
        return events

    def _launch(self) -> bool:
        """Whether there was anything to run."""
        now_us = self.runner.now_us()
        plan = self.scheduler.next_step(now_us)
        inputs, outputs = self._inputs(plan, now_us)
        if inputs.num_tokens:
            if self._tiers is not None:
                self._tiers.release(inputs.page_ids.tolist())
            launched = self.runner.launch(inputs)
            if self._tiers is not None:
                for key in plan.prefill[plan.ends].tolist():
                    self._tiers.store(self.scheduler.blocks_of(key), self.scheduler.pages.pages(key))
            at_launch = AtLaunch(
                running=self.scheduler.num_running, waiting=self.scheduler.num_waiting, pages=self._used_pages(),
                plan_us=self.runner.now_us() - now_us, follows=bool(self._in_flight),
            )  # fmt: skip
            self._in_flight.append(_InFlight(launched, outputs, plan, at_launch))
        for key in self.scheduler.end_step(now_us).tolist():  # its last token is under way
            self._give_slot_back(self._requests[key])
        return bool(inputs.num_tokens)

    def _inputs(self, plan: LiveStep, now_us: float) -> tuple[StepInputs, list[Request]]:
        """The planned step by slots, and whose tokens it gives."""
        requests = self._requests
        for key in plan.preempted.tolist():
            requests[key].preemptions += 1
            requests[key].status = WAITING
            self._give_slot_back(requests[key])
        sampling = []
        for key, begin in zip(plan.prefill.tolist(), plan.prefill_begins.tolist()):
            request = requests[key]
            if request.slot is None:
                sampling.append(self._take_slot(request, begin, now_us))
        outputs = [requests[key] for key in (*plan.decode.tolist(), *plan.prefill[plan.ends].tolist())]
        choice = max((request.params.choice for request in outputs), default=LIKELIEST)
        return step_inputs(plan, requests, self.scheduler.pages.pages, sampling=sampling, choice=choice), outputs

    def _take_slot(self, request: Request, cached: int, now_us: float) -> SlotSampling:
        request.slot, request.status = self._free_slots.pop(), RUNNING
        if request.first_run_us is None:
            request.first_run_us, request.hit_tokens = now_us, cached
        params = request.params
        return SlotSampling(request.slot, params.temperature, params.top_p, params.seed)

    def _give_slot_back(self, request: Request) -> None:
        if request.slot is not None:
            self._free_slots.append(request.slot)
            request.slot = None

    def _collect(self) -> list[Event]:
        """Reads the tokens of the step that was launched first of those under way."""
        step = self._in_flight.popleft()
        tokens = step.launched.wait().tolist()
        now_us = self.runner.now_us()
        events = []
        for request, token in zip(step.outputs, tokens):
            if request.id not in self._requests:
                continue  # it had ended before this step, which was planned when nobody knew
            request.tokens.append(token)
            request.token_us.append(now_us)
            params = request.params
            stops = not params.ignore_eos and (token in self.eos_token_ids or token in params.stop_token_ids)
            if stops or len(request.tokens) == params.max_tokens:
                self._leave(request)
                request.reason = "stop" if stops else "length"
                request.status, request.end_us = SERVED, now_us
            events.append(Event(request, [token], request.end_us is not None))
        if self.steps is not None:
            self.steps.append(step_record(step.plan, step.at_launch, step.launched.times()))
        return events

    def _leave(self, request: Request) -> None:
        """Takes a request out of all books."""
        del self._requests[request.id]
        if self.scheduler.holds(request.id):
            self.scheduler.cancel(request.id, self.runner.now_us())
        self._give_slot_back(request)

    def _abandon(self, reason: str) -> None:
        """Cancels all requests and forgets the cache, blocks that other prompts could have taken from it too."""
        while self._in_flight:
            with suppress(Exception):  # its buffers are used again, and nobody asks for its tokens
                self._in_flight.popleft().launched.wait()
        if self._tiers is not None:
            self._tiers.abandon()
        limits = self.scheduler.limits
        self.scheduler, self._free_slots = LiveScheduler(limits, self._tiers), _all_slots(limits)
        for request in self.unfinished():
            request.slot, request.reason = None, reason
            self._end(request, CANCELLED, self.runner.now_us())
        self._requests.clear()

    def _end(self, request: Request, status: str, now_us: float) -> None:
        request.status, request.end_us = status, now_us
        self._ended.append(request)

    def _used_pages(self) -> int:
        return self.scheduler.num_used_pages


def _all_slots(limits: Limits) -> list[int]:
    """Free slots, of which the last is taken first."""
    return list(range(limits.max_batch - 1, -1, -1))
