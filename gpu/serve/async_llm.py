"""An LLM as an asynchronous service: its loop runs in a thread, requests come from coroutines.

    async with AsyncLLM(llm) as service:
        async for token in service.stream(prompt, params): ...
"""
from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, suppress

from gpu.serve.llm import LLM
from gpu.serve.server import CANCELLED, REFUSED, Event, Request
from gpu.serve.step import GREEDY, SamplingParams

_Queue = asyncio.Queue  # of Event; ValueError where its request cannot be added; None where the loop has ended


class AsyncLLM:
    """An LLM whose loop runs in a thread of its own, for any number of coroutines of one event loop.

    Nothing else may drive the LLM meanwhile. Leaving the context cancels what is left: those streams raise
    RuntimeError.
    """

    __slots__ = ("llm", "_thread", "_wake", "_orders", "_queues", "_open", "_loop", "_runs", "_closing", "_failure",
                 "_claim")

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._orders: list[Callable[[], object]] = []  # what coroutines ask the thread to do between steps
        self._queues: dict[int, _Queue] = {}  # by request
        self._open: set[_Queue] = set()  # of all streams, those too whose request nobody has added yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runs = self._closing = False
        self._failure: BaseException | None = None
        self._claim = ExitStack()

    async def __aenter__(self) -> AsyncLLM:
        """RuntimeError where something else drives the LLM."""
        self._claim.enter_context(self.llm.server.driven_by("AsyncLLM"))
        self._loop, self._runs, self._closing, self._failure = asyncio.get_running_loop(), True, False, None
        self._orders, self._queues, self._open = [], {}, set()
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
        RuntimeError outside of the context, and where the loop has failed or ends before the request."""
        ids = self.llm.encode(prompt)
        queue: _Queue = asyncio.Queue()
        request: Request | None = None

        def add() -> None:
            nonlocal request
            try:
                request = self.llm.server.add_request(ids, params)
            except ValueError as error:  # this stream's fault, which the others need not know of
                self._put(queue, error)
            else:
                self._queues[request.id] = queue

        with self._wake:
            if not self._runs or self._closing:
                raise RuntimeError("stream: expected a service within `async with AsyncLLM(llm) as service`, got one "
                                   "that does not run") from self._failure
            self._open.add(queue)
            self._orders.append(add)
            self._wake.notify()
        try:
            while True:
                event = await queue.get()
                if event is None:
                    raise RuntimeError("stream: the serving loop has ended") from self._failure
                if isinstance(event, ValueError):
                    raise event
                for token in event.tokens:
                    yield token
                if event.ended and event.request.status == REFUSED:
                    raise ValueError(event.request.reason)
                if event.ended and event.request.status == CANCELLED:
                    raise RuntimeError("stream: the request was cancelled before its end") from self._failure
                if event.ended:
                    return
        finally:
            with self._wake:
                self._open.discard(queue)
                self._orders.append(lambda: request is not None and self.llm.server.cancel(request))
                self._wake.notify()

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
        """All tokens of a request. Errors as stream()."""
        return [token async for token in self.stream(prompt, params)]

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
            with self._wake:
                self._runs = False
                left = list(self._open)
            self._claim.close()
            for queue in left:
                self._put(queue, None)

    def _tell(self, event: Event) -> None:
        queue = self._queues.get(event.request.id)
        if queue is not None:
            self._put(queue, event)
            if event.ended:
                del self._queues[event.request.id]

    def _put(self, queue: _Queue, item: Event | ValueError | None) -> None:
        with suppress(RuntimeError):  # of an event loop that was closed: nobody waits any more
            self._loop.call_soon_threadsafe(queue.put_nowait, item)
