"""The loop: every request ends, as it should, and its pages come back, whatever is added and cancelled when."""
from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stub_pool import StubPool
from stub_runner import StubRunner, expected_tokens

from gpu.serve.server import CANCELLED, REFUSED, SERVED, Server
from gpu.serve.step import SamplingParams
from gpu.serve.tiers.prompt_tiers import PromptTiers
from pkvsim.memory.blocks.block_keys import block_keys
from pkvsim.memory.prefix_cache import KINDS
from pkvsim.serving.live import live_scheduler
from pkvsim.serving.state import Limits

VOCABULARY, PAGE = 50, 4


def make_server(*, num_pages=40, max_batch=4, step_tokens=16, cache="lru", max_context=100, record=False,
                tiers: Callable[[StubRunner], PromptTiers] | None = None) -> Server:
    limits = Limits(PAGE, num_pages, 1, max_batch, step_tokens, KINDS.index(cache))
    runner = StubRunner(max_batch=max_batch, num_pages=num_pages, page_size=PAGE, max_pages=-(-max_context // PAGE),
                        vocab_size=VOCABULARY)
    return Server(runner, limits, max_context=max_context, vocab_size=VOCABULARY, eos_token_ids=(3,), record=record,
                  tiers=None if tiers is None else tiers(runner))


def tiers_of(seed: int, faults: float) -> Callable[[StubRunner], PromptTiers]:
    """Tiers over a pool of that seed and part of loads that fail."""
    return lambda runner: PromptTiers(StubPool(runner, seed=seed, faults=faults), page_size=PAGE, on_stream=nullcontext)


def run(server: Server, *, steps: int = 100_000) -> None:
    for _ in range(steps):
        if not server.has_work:
            return
        server.step()
    raise AssertionError("the server does not come to an end")


def expect(request) -> None:
    """A served request has the stub's tokens, cut where one of them ends it."""
    params = request.params
    tokens = expected_tokens(request.prompt.tolist(), params.max_tokens, VOCABULARY)
    stops = () if params.ignore_eos else (3, *params.stop_token_ids)
    ends = [at for at, token in enumerate(tokens) if token in stops]
    assert request.tokens == (tokens[: ends[0] + 1] if ends else tokens)
    assert request.reason == ("stop" if ends else "length")
    assert len(request.token_us) == len(request.tokens)


class Machine(RuleBasedStateMachine):
    """Adds, steps and cancels."""

    @initialize(cache=st.sampled_from(["none", "lru"]), num_pages=st.integers(8, 40), step_tokens=st.integers(4, 30),
                faults=st.sampled_from([None, 0.0, 0.3]), seed=st.integers(0, 999))
    def start(self, cache, num_pages, step_tokens, faults, seed):
        self.server = make_server(cache=cache, num_pages=num_pages, step_tokens=step_tokens, max_context=60,
                                  tiers=None if faults is None else tiers_of(seed, faults))
        self.open, self.told = {}, {}

    @rule(head=st.integers(0, 24), own=st.integers(0, 40), token=st.integers(0, VOCABULARY), output=st.integers(1, 30),
          ignore=st.booleans())
    def add(self, head, own, token, output, ignore):
        prompt = np.concatenate([np.arange(head), np.full(own, token)])
        request = self.server.add_request(prompt, SamplingParams(max_tokens=output, ignore_eos=ignore))
        fits = 0 < head + own <= 60 - output and (own == 0 or token < VOCABULARY)
        fits = fits and -(-(head + own + output - 1) // PAGE) <= self.server.scheduler.limits.num_pages
        assert (request.status == REFUSED) == (not fits)
        assert fits or request.reason.startswith("prompt: expected")
        self.open[request.id] = request

    @precondition(lambda self: self.server.has_work)
    @rule()
    def step(self):
        for event in self.server.step():
            self.told.setdefault(event.request.id, []).extend(event.tokens)
            if event.ended:
                request = self.open.pop(event.request.id)
                assert self.told.pop(request.id) == request.tokens
                assert request.status in (SERVED, REFUSED, CANCELLED)
                if request.status == SERVED:
                    expect(request)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        request = self.open[data.draw(st.sampled_from(sorted(self.open)))]
        ended = request.status in (SERVED, REFUSED, CANCELLED)
        assert self.server.cancel(request) == (not ended)
        assert not self.server.cancel(request)

    @invariant()
    def pages_are_accounted_for(self):
        if hasattr(self, "server"):
            scheduler = self.server.scheduler
            running = [r.id for r in self.open.values() if r.slot is not None]
            assert len(running) + len(self.server._free_slots) == scheduler.limits.max_batch
            tiers = self.server._tiers
            scheduler.pages.check(running if tiers is None else sorted({*running, *scheduler.untold}))
            assert tiers is None or tiers.is_waiting <= bool(scheduler.untold)

    def teardown(self):
        if hasattr(self, "server"):
            while self.server.has_work:
                self.step()
            assert not self.open and self.server.num_free_pages == self.server.scheduler.limits.num_pages


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


def test_a_long_life_leaves_nothing_behind():
    """1,000 requests in bursts, a third of them cancelled or refused: all end, pages and memory come back."""
    server = make_server(num_pages=120, max_batch=12, step_tokens=64)
    rng = np.random.default_rng(0)
    ended: dict[str, int] = {}
    waiting: list = []
    sizes = []
    for burst in range(20):
        for _ in range(50):
            prompt = np.concatenate([np.arange(int(rng.integers(0, 40))), rng.integers(0, VOCABULARY, int(rng.integers(1, 70)))])
            waiting.append(server.add_request(prompt, SamplingParams(max_tokens=int(rng.integers(1, 20)))))
        for request in rng.choice(np.array(waiting, object), 10, replace=False):
            server.cancel(request)
        run(server)
        for request in waiting:
            ended[request.status] = ended.get(request.status, 0) + 1
            if request.status == SERVED:
                expect(request)
        waiting.clear()
        assert server.num_free_pages == 120 and server.num_unfinished == 0
        if burst == 4:
            tracemalloc.start()
        if burst >= 9 and burst % 5 == 4:
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sum(ended.values()) == 1000 and min(ended[status] for status in (SERVED, REFUSED, CANCELLED)) > 50
    assert sizes[-1] < sizes[0] + 200_000


@pytest.mark.parametrize("cache", ["none", "lru"])
@pytest.mark.parametrize("faults", [0.0, 0.3])
def test_prompts_come_back_from_tiers(cache, faults):
    """Conversations whose prompts grow, beyond what pages hold, several at once, some cancelled: tokens are their own,
    most of a prompt is loaded or found, and nothing stays taken."""
    server = make_server(num_pages=60, max_batch=8, step_tokens=32, cache=cache, tiers=tiers_of(1, faults), record=True)
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, VOCABULARY, 100) for _ in range(6)]
    asked = 0
    for turn in range(60):
        requests = [server.add_request(texts[at][: 30 + turn], SamplingParams(max_tokens=4))
                    for at in rng.integers(0, len(texts), 4)]
        for _ in range(int(rng.integers(0, 4))):
            server.step()
        if turn % 3 == 0:
            server.cancel(requests[1])
        run(server)
        for request in requests:
            if request.status == SERVED:
                expect(request)
                asked += len(request.prompt)
        assert server.num_free_pages == 60 and not server._tiers.is_waiting and not server._tiers._arriving
    computed = sum(step.prefill_tokens for step in server.steps)
    assert computed < asked * (0.6 if faults else 0.5)  # nothing of it is computed again but what the pool has lost
    assert server._tiers.loaded_tokens > (0.4 if cache == "none" else 0.1) * asked
    assert not server.scheduler._blocks


@pytest.mark.parametrize("cache", ["none", "lru"])
def test_a_prompt_is_hashed_once_for_the_scheduler_and_its_tiers(cache, monkeypatch):
    """Also where its request is preempted, loads again, and is stored."""
    hashed = []

    def counted(tokens, page_size):
        hashed.append(len(tokens))
        return block_keys(tokens, page_size)

    monkeypatch.setattr(live_scheduler, "block_keys", counted)
    monkeypatch.setattr(hashlib, "blake2b", None)  # nor by anything else
    server = make_server(num_pages=24, cache=cache, tiers=tiers_of(2, 0.3))
    rng = np.random.default_rng(1)
    texts, lengths, preemptions = [rng.integers(4, VOCABULARY, 40) for _ in range(3)], [], 0
    for _ in range(12):
        requests = [server.add_request(texts[at], SamplingParams(max_tokens=16, ignore_eos=True))
                    for at in rng.integers(0, 3, 4)]
        lengths += [len(request.prompt) for request in requests]
        run(server)
        preemptions += sum(request.preemptions for request in requests)
    assert hashed == lengths and preemptions and server._tiers.loads
    # A store keeps all whole blocks, and a prefix cache alone asks for none of the last token's.
    assert set(server._tiers._pool.kept) <= {key for text in texts for key in block_keys(text, PAGE)}
    assert any(block_keys(text, PAGE)[-1] in server._tiers._pool.kept for text in texts)


@pytest.mark.parametrize(("prompt", "match"), [
    ([], "at least one, got none"), ([[1, 2]], "token ids"), ([1.5], "token ids"), ([-1], r"in \[0, 50\)"), ([50], r"in \[0, 50\)"),
    ([1] * 99, "at most 100 tokens"), ([1] * 90, "at most 20 pages"), ([1, [2, 3]], "token ids"), ("text", "token ids"),
    (None, "token ids"), ([2**70], "token ids"), ([True], "token ids"),
])
def test_refusals_say_why(prompt, match):
    server = make_server(num_pages=20)
    request = server.add_request(prompt, SamplingParams(max_tokens=4))
    assert request.status == REFUSED
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(request.reason)
    assert [event.ended for event in server.step()] == [True] and not server.has_work


@pytest.mark.parametrize(("field", "value"), [
    ("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1),
    ("temperature", "0"), ("temperature", None), ("temperature", 1e39), ("top_p", "1"), ("stop_token_ids", 5),
    ("stop_token_ids", ["a"]), ("stop_token_ids", [-1]), ("max_tokens", 1.0),
])
def test_sampling_params_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_the_next_step_is_launched_before_the_last_one_is_read():
    server = make_server(record=True)
    server.add_request(np.arange(10), SamplingParams(max_tokens=8, ignore_eos=True))
    server.step()
    assert server.runner.launched == 1 and server.runner.waited == 0
    server.step()
    assert server.runner.launched == 2 and server.runner.waited == 1
    run(server)
    assert [step.follows for step in server.steps] == [False] + [True] * 7


class _Model:
    """As much of an LLM as AsyncLLM asks for."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def encode(self, prompt):
        return prompt


def test_streams_of_an_asynchronous_service():
    from gpu.serve.async_llm import AsyncLLM

    server = make_server(num_pages=60)

    async def leave_early(service):
        got = []
        async for token in service.stream([1, 2, 3], SamplingParams(max_tokens=90, ignore_eos=True)):
            got.append(token)
            if len(got) == 3:
                break
        return got

    async def main():
        async with AsyncLLM(_Model(server)) as service:
            prompts = [list(range(1 + at)) for at in range(12)]
            params = SamplingParams(max_tokens=9, ignore_eos=True)
            all_of = await asyncio.gather(*(service.generate(prompt, params) for prompt in prompts), leave_early(service))
            with pytest.raises(ValueError, match="at most 100 tokens"):
                await service.generate([1] * 100, params)
        return prompts, all_of

    prompts, found = asyncio.run(asyncio.wait_for(main(), 30))
    assert found[:-1] == [expected_tokens(prompt, 9, VOCABULARY) for prompt in prompts]
    assert found[-1] == expected_tokens([1, 2, 3], 3, VOCABULARY)
    assert server.num_free_pages == 60 and not server.has_work
