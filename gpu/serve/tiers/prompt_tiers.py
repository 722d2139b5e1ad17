"""Loads of prompts from tiers beyond the pages, and stores of those that have been computed, for one server.

A block is a page of tokens. What a load brings is computed by nobody; what it does not bring, as where a disk has
failed, is computed as after any miss.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gpu.cache.tiers.handles import LoadHandle, StoreHandle

PAUSE_S = 2e-4  # of a server that has nothing to run before a load has ended


class Pool(Protocol):
    """What gpu.cache.prompts.prompt_pool.PromptPool has of it."""

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Leading blocks that a load would bring."""

    def load(self, keys: Sequence[bytes], pages: np.ndarray) -> LoadHandle:
        """Begins to load the blocks into pages."""

    def store(self, keys: Sequence[bytes], pages: np.ndarray) -> StoreHandle:
        """Begins to store the blocks that are in pages."""

    def stats(self) -> dict[str, Any]:
        """What its tiers have done so far."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for blocks: of its own load, whose handle it has, or of others', by their keys."""

    first: int  # block
    pages: list[int]  # that are written
    since_s: float
    handle: LoadHandle | None = None
    behind: set[int] = field(default_factory=set)


class PromptTiers:
    """A pkvsim.serving.live PromptLoads. For the server's thread alone.

    loads, loaded_tokens: of requests, in all. load_s: from asking until a load was seen to have ended, which the server
    looks for before each step, seconds in all; copy_s: until its copies had, as pkvsim's load_s.
    """

    __slots__ = ("loads", "loaded_tokens", "load_s", "copy_s", "_pool", "_page_size", "_on_stream", "_waiting",
                 "_again", "_arriving", "_storing")  # fmt: skip

    def __init__(self, pool: Pool, *, page_size: int, on_stream: Callable[[], AbstractContextManager]) -> None:
        """on_stream: makes the stream current on which steps run, and which loads and stores wait for."""
        self.loads, self.loaded_tokens, self.load_s, self.copy_s = 0, 0, 0.0, 0.0
        self._pool, self._page_size, self._on_stream = pool, page_size, on_stream
        self._waiting: dict[int, _Waiting] = {}
        self._again: list[int] = []  # that waited for others
        self._arriving: dict[int, int] = {}  # by page, whose load writes to it
        self._storing: list[tuple[StoreHandle, frozenset[int]]] = []  # and pages that must keep their KV for it

    @property
    def is_waiting(self) -> bool:
        """Whether a request waits for blocks."""
        return bool(self._waiting)

    def begin(
        self, key: int, *, blocks: Sequence[bytes], cached: int, target: int, pages: list[int], own: int
    ) -> int | None:  # fmt: skip
        """As PromptLoads has it."""
        first, end = cached // self._page_size, min(len(blocks), (target - 1) // self._page_size)
        if first >= end:
            return cached
        waiting = _Waiting(first, [], time.perf_counter())
        waiting.behind = {self._arriving[page] for page in pages[first:end] if page in self._arriving}
        if not waiting.behind:
            hits = self._pool.lookup(blocks[first : min(end, own)])
            if not hits:
                return cached
            waiting.pages = pages[first : first + hits]
            self.release(waiting.pages)
            with self._on_stream():
                waiting.handle = self._pool.load(blocks[first : first + hits], np.array(waiting.pages, np.int32))
            self._arriving.update(dict.fromkeys(waiting.pages, key))
        self._waiting[key] = waiting
        return None

    def arrived(self) -> list[tuple[int, int | None]]:
        """As PromptLoads has it."""
        found: list[tuple[int, int | None]] = []
        for key, waiting in list(self._waiting.items()):
            if waiting.handle is None or not waiting.handle.is_done:
                continue
            valid = 0
            with suppress(Exception):  # of the GPU, whose steps meet it too; its blocks are computed
                valid = waiting.handle.wait()
            self.loads += 1
            self.loaded_tokens += valid * self._page_size
            now_s, ended_s = time.perf_counter(), waiting.handle.ended_s
            self.load_s += now_s - waiting.since_s
            self.copy_s += (now_s if math.isnan(ended_s) else ended_s) - waiting.since_s
            self._end(key)
            found.append((key, (waiting.first + valid) * self._page_size))
        found += [(key, None) for key in self._again]
        self._again.clear()
        return found

    def cancel(self, key: int) -> None:
        """As PromptLoads has it."""
        if key in self._again:
            self._again.remove(key)
        if key in self._waiting:
            handle = self._waiting[key].handle
            if handle is not None:
                handle.cancel()
            self._end(key)

    def _end(self, key: int) -> None:
        """A request waits no more, and others need not wait for it."""
        for page in self._waiting.pop(key).pages:
            del self._arriving[page]
        for other, waiting in list(self._waiting.items()):
            if key in waiting.behind:
                waiting.behind.remove(key)
                if not waiting.behind:
                    del self._waiting[other]
                    self._again.append(other)

    def store(self, blocks: Sequence[bytes], pages: list[int]) -> None:
        """Stores the whole blocks, by their keys, of a prompt whose last chunk has been launched and which has these
        pages."""
        if not blocks:
            return
        with self._on_stream():
            handle = self._pool.store(blocks, np.array(pages[: len(blocks)], np.int32))
        if handle.blocks:
            self._storing.append((handle, frozenset(pages[: len(blocks)])))

    def release(self, pages: Sequence[int]) -> None:
        """Waits until no store reads these pages, which are to be written."""
        kept = []
        for handle, reads in self._storing:
            if not handle.is_copied:
                if reads.isdisjoint(pages):
                    kept.append((handle, reads))
                else:
                    handle.wait_copied()
        self._storing = kept

    def pause(self) -> None:
        """Lets loads go on for a moment, as there is nothing else to do."""
        time.sleep(PAUSE_S)

    def abandon(self) -> None:
        """Gives up all loads and waits for what stores read: nothing reads or writes pages any more."""
        for key in list(self._waiting):
            self.cancel(key)
        self._again.clear()
        for handle, _ in self._storing:
            handle.wait_copied()
        self._storing.clear()

    def stats(self) -> dict[str, Any]:
        """What has been loaded, and the pool's own."""
        return {"loads": self.loads, "loaded_tokens": self.loaded_tokens, "load_s": self.load_s, "copy_s": self.copy_s,
                **self._pool.stats()}
