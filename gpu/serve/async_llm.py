"""An LLM as an asynchronous service: its loop runs in a thread, requests come from coroutines.

    async with AsyncLLM(llm) as service:
        async for token in service.stream(prompt, params): ...
"""
from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from gpu.serve.llm import LLM
from gpu.serve.server import REFUSED, Event, Request
from gpu.serve.step import GREEDY, SamplingParams


class AsyncLLM:
    """An LLM whose loop runs in a thread of its own, for any number of coroutines of one event loop.

    Leaving the context cancels what is left.
    """

    __slots__ = ("llm", "_thread", "_wake", "_orders", "_queues", "_loop", "_closing", "_failure")

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._orders: list[Callable[[], None]] = []  # what coroutines ask the thread to do between steps
        self._queues: dict[int, asyncio.Queue[Event | None]] = {}  # by request
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._failure: BaseException | None = None

    async def __aenter__(self) -> AsyncLLM:
        self._loop, self._closing = asyncio.get_running_loop(), False
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    async def stream(self, prompt: str | Sequence[int], params: SamplingParams = GREEDY) -> AsyncIterator[int]:
        """The request's tokens as they come. Leaving the iteration cancels it. ValueError where it is refused,
        RuntimeError where the loop has failed."""
        ids = self.llm.encode(prompt)
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        request: Request | None = None

        def add() -> None:
            nonlocal request
            request = self.llm.server.add_request(ids, params)
            self._queues[request.id] = queue

        self._ask(add)
        try:
            while True:
                event = await queue.get()
                if event is None:
                    raise RuntimeError("stream: the serving loop has ended") from self._failure
                for token in event.tokens:
                    yield token
                if event.ended and event.request.status == REFUSED:
                    raise ValueError(event.request.reason)
                if event.ended:
                    return
        finally:
            self._ask(lambda: request is not None and self.llm.server.cancel(request))

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
        """All tokens of a request. Errors as stream()."""
        return [token async for token in self.stream(prompt, params)]

    def _ask(self, order: Callable[[], object]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    def _run(self) -> None:
        server = self.llm.server
        try:
            while True:
                with self._wake:
                    while not (self._orders or self._closing or server.has_work):
                        self._wake.wait()
                    orders, self._orders = self._orders, []
                    closing = self._closing
                for order in orders:
                    order()
                if closing:
                    for request in server.unfinished():
                        server.cancel(request)
                for event in server.step():
                    self._tell(event)
                if closing and not server.has_work:
                    return
        except BaseException as error:
            self._failure = error
            raise
        finally:
            for queue in self._queues.values():
                self._loop.call_soon_threadsafe(queue.put_nowait, None)

    def _tell(self, event: Event) -> None:
        queue = self._queues.get(event.request.id)
        if queue is not None:
            self._loop.call_soon_threadsafe(queue.put_nowait, event)
            if event.ended:
                del self._queues[event.request.id]
