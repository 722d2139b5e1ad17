"""What fails takes nothing else with it: steps that raise, interrupts, callers that get in each other's way."""
from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from test_server import _Model, expect, make_server, run

pytest.importorskip("torch")

from gpu.serve.async_llm import AsyncLLM  # noqa: E402
from gpu.serve.llm import LLM, ServeOptions  # noqa: E402
from gpu.serve.server import CANCELLED, SERVED  # noqa: E402
from gpu.serve.step import SamplingParams  # noqa: E402


def fail_at(server, monkeypatch, *, launch=None, wait=None, error=RuntimeError):
    """The runner raises when the step of that number is launched, or waited for; once."""
    real, left = server.runner.launch, {"launch": launch, "wait": wait}

    def raise_at(kind):
        if left[kind] is not None:
            left[kind] -= 1
            if left[kind] < 0:
                left[kind] = None
                raise error("out of memory")

    class Step:
        def __init__(self, step):
            self.step = step

        def wait(self):
            tokens = self.step.wait()
            raise_at("wait")
            return tokens

        def times(self):
            return self.step.times()

    def launch_one(inputs):
        raise_at("launch")
        return Step(real(inputs))

    monkeypatch.setattr(server.runner, "launch", launch_one)


@pytest.mark.parametrize("where", ["launch", "wait"])
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_step_cancels_all_and_the_server_goes_on(monkeypatch, where, at, error):
    server = make_server(num_pages=30, step_tokens=8, max_batch=2)
    fail_at(server, monkeypatch, **{where: at}, error=error)
    first = [server.add_request(np.arange(20), SamplingParams(max_tokens=6, ignore_eos=True)) for _ in range(4)]
    with pytest.raises(error):
        run(server)
    assert all(request.status == CANCELLED and "out of memory" in request.reason for request in first)
    assert server.num_unfinished == 0 and server.num_free_pages == 30
    told = [event.request.id for event in server.step()]
    assert told == [request.id for request in first] and not server.has_work
    # Blocks of the same prompt that the failed step has not written must not be taken from the prefix cache.
    again = [server.add_request(np.arange(20), SamplingParams(max_tokens=6)) for _ in range(4)]
    run(server)
    for request in again:
        assert request.status == SERVED
        expect(request)
    server.scheduler.pages.check([])


@pytest.fixture
def llm(monkeypatch):
    """An LLM of a stub's tokens, without weights."""
    made = object.__new__(LLM)
    made.server, made.options, made._tokenizer, made._model = make_server(), ServeOptions(), None, "nothing"
    return made


@pytest.mark.parametrize(("prompts", "params", "words"), [
    ("a text", SamplingParams(), "prompts: expected a list"), (b"bytes", SamplingParams(), "prompts: expected a list"),
    (None, SamplingParams(), "prompts: expected a list"), (5, SamplingParams(), "prompts: expected a list"),
    ([1, 2], SamplingParams(), "prompts: expected texts or lists"), ([b"ab"], SamplingParams(), "prompts: expected texts"),
    ([[1], "text"], SamplingParams(), "prompts: expected token ids, as nothing has no tokenizer"),
    ([[1]], {"max_tokens": 3}, "params: expected SamplingParams"), ([[1]], [None], "params: expected SamplingParams"),
    ([[1]], None, "params: expected SamplingParams"), ([[1]], [SamplingParams()] * 2, "params: expected one, or 1"),
])
def test_generate_refuses_before_it_takes_anything_in(llm, prompts, params, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(prompts, params)
    assert not llm.server.has_work


def test_an_interrupted_generate_leaves_nothing_behind(llm, monkeypatch):
    fail_at(llm.server, monkeypatch, wait=2, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=20))
    assert not llm.server.has_work and llm.server.num_free_pages == 40
    assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))[0].tokens) == 5


def test_one_server_has_one_driver(llm):
    with llm.server.driven_by("test"):
        with pytest.raises(RuntimeError, match="generate: expected a server that nobody else drives"):
            llm.generate([[1]])
        with pytest.raises(RuntimeError, match="restart: expected"):
            llm.restart()

    async def main():
        async with AsyncLLM(llm) as service:
            with pytest.raises(RuntimeError, match="generate: expected"):
                llm.generate([[1]])
            with pytest.raises(RuntimeError, match="AsyncLLM: expected"):
                await service.__aenter__()
            return await service.generate([1], SamplingParams(max_tokens=2, ignore_eos=True))

    assert len(asyncio.run(asyncio.wait_for(main(), 20))) == 2
    assert len(llm.generate([[1]], SamplingParams(max_tokens=2, ignore_eos=True))[0].tokens) == 2


def test_a_service_that_does_not_run_says_so():
    service = AsyncLLM(_Model(make_server()))

    async def main():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="within `async with"):
                await service.generate([1])
            async with service:
                assert len(await service.generate([1], SamplingParams(max_tokens=3, ignore_eos=True))) == 3

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_stream_that_the_service_ends_is_not_taken_for_a_whole_one():
    server = make_server()

    async def main():
        async with AsyncLLM(_Model(server)) as service:
            task = asyncio.create_task(service.generate([1], SamplingParams(max_tokens=90, ignore_eos=True)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="cancelled before its end"):
            await task

    real = server.runner.launch
    held = threading.Event()
    server.runner.launch = lambda inputs: (held.wait(0.005), real(inputs))[1]
    asyncio.run(asyncio.wait_for(main(), 20))
    assert not server.has_work


def test_a_request_that_cannot_be_added_fails_alone():
    server = make_server()

    async def main():
        async with AsyncLLM(_Model(server)) as service:
            good = asyncio.create_task(service.generate([1], SamplingParams(max_tokens=20, ignore_eos=True)))
            with pytest.raises(ValueError, match="params: expected SamplingParams"):
                await service.generate([1], {"max_tokens": 3})
            with pytest.raises(ValueError, match="prompt: expected token ids"):
                await service.generate([1, [2]])
            assert len(await good) == 20

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_loop_ends_every_stream(monkeypatch):
    server = make_server(max_batch=1)
    fail_at(server, monkeypatch, launch=3)

    async def main():
        async with AsyncLLM(_Model(server)) as service:
            params = SamplingParams(max_tokens=9, ignore_eos=True)
            found = await asyncio.gather(*(service.generate([1], params) for _ in range(3)), return_exceptions=True)
            assert all(isinstance(error, RuntimeError) for error in found)
            assert "out of memory" in str(found[0].__cause__)
            with pytest.raises(RuntimeError, match="within `async with"):
                await service.generate([1], params)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert server.num_free_pages == 40
