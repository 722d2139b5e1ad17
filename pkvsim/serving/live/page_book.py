"""Which pages of a pool hold what: the scheduler counts pages, this gives them numbers.

Blocks of a prefix cache are one page each here, and keep their number while they are resident. A page that nobody uses
is given out again last in, first out.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class NewPages:
    """Pages that a request has from now on: page_ids[i] holds its tokens of page first + i."""

    request: int
    first: int
    page_ids: list[int]


class PageBook:
    """The numbers of the pages of blocks and requests."""

    __slots__ = ("num_pages", "page_of_block", "_free", "_pages", "_shared")

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.page_of_block = np.full(0, -1, np.int64)  # [block ids], -1: not resident
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}  # by request, in order of tokens
        self._shared: dict[int, int] = {}  # by request, how many of these belong to blocks

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def pages(self, request: int) -> list[int]:
        """Pages of a running request, in order of tokens."""
        return self._pages[request]

    def open(self, request: int, blocks: np.ndarray, private: int) -> NewPages:
        """Pages of a request that begins to run: those of its blocks [b] int64, taken where they are not resident, and
        as many of its own."""
        for block in blocks[self.page_of_block[blocks] < 0].tolist():
            if self.page_of_block[block] < 0:  # a prompt may name a block twice
                self.page_of_block[block] = self._free.pop()
        pages = self.page_of_block[blocks].tolist() + [self._free.pop() for _ in range(private)]
        self._pages[request], self._shared[request] = pages, len(blocks)
        return NewPages(request, 0, pages)

    def extend(self, request: int, private: int) -> NewPages:
        """Lengthens a running request to so many pages of its own."""
        pages = self._pages[request]
        first = len(pages)
        added = [self._free.pop() for _ in range(self._shared[request] + private - first)]
        pages += added
        return NewPages(request, first, added)

    def close(self, request: int) -> None:
        """Gives back the pages that were the request's own; those of blocks stay until drop_blocks."""
        pages = self._pages.pop(request)
        self._free.extend(reversed(pages[self._shared.pop(request) :]))

    def drop_blocks(self, users: np.ndarray) -> None:
        """Gives back the pages of blocks that are not resident: users [block ids] is below 0."""
        gone = np.flatnonzero((self.page_of_block >= 0) & (users[: len(self.page_of_block)] < 0))
        self._free.extend(self.page_of_block[gone].tolist())
        self.page_of_block[gone] = -1

    def renumber_blocks(self, kept: np.ndarray, room: int) -> None:
        """Block kept[i] is block i from now on, of `room`; the others hold no page."""
        moved = np.full(room, -1, np.int64)
        known = kept[kept < len(self.page_of_block)]
        moved[: len(known)] = self.page_of_block[known]
        self.page_of_block = moved

    def check(self, running: Sequence[int]) -> None:
        """AssertionError unless every page is free, or a block's, or one running request's own."""
        own = [page for request in running for page in self._pages[request][self._shared[request] :]]
        blocks = self.page_of_block[self.page_of_block >= 0].tolist()
        assert sorted(self._free + own + blocks) == list(range(self.num_pages))
        assert sorted(self._pages) == sorted(running)
