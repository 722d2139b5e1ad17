"""From scores to lists: pins, budgets, pages that are taken. Budgets are integers, so that the GPU's are the same."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.schedule.page_lists import PageList
from pkvsim.shapes import MAX_TOKENS, check_int, is_number

PARTS = 2**16  # the budget's fractions are this fine, in cuda_src/select.cu too


@dataclass(frozen=True, slots=True)
class Pins:
    """Pages that are read whatever their scores: a row's first ones (attention sinks) and its last ones."""

    sink_pages: int = 1
    recent_pages: int = 2

    def __post_init__(self) -> None:
        check_int("sink_pages", self.sink_pages, 0, MAX_TOKENS)
        check_int("recent_pages", self.recent_pages, 0, MAX_TOKENS)

    def pinned(self, row_pages: int) -> np.ndarray:
        """Whether each of a row's pages is, bool [row_pages]."""
        at = np.arange(row_pages)
        return (at < self.sink_pages) | (at >= row_pages - self.recent_pages)


@dataclass(frozen=True, slots=True)
class Budget:
    """How many of a row's pages each KV head reads: a fraction of them, rounded up, at least least_pages."""

    fraction: float = 0.1
    least_pages: int = 8

    def __post_init__(self) -> None:
        if not (is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ValueError(f"fraction: expected a part of a row's pages in (0, 1], got {self.fraction!r}")
        check_int("least_pages", self.least_pages, 0, MAX_TOKENS)

    @property
    def parts(self) -> int:
        """The fraction in 1 / PARTS, rounded down, so that 0.3 of 20 pages are 6; at least one."""
        return max(1, int(self.fraction * PARTS))

    def pages(self, row_pages: int, pins: Pins = Pins(0, 0)) -> int:  # noqa: B008
        """Pages that a head of a row of so many reads: never fewer than are pinned, nor more than there are."""
        asked = max(self.least_pages, (row_pages * self.parts + PARTS - 1) // PARTS)
        return min(row_pages, max(asked, pins.sink_pages + pins.recent_pages))


def top_pages(scores: np.ndarray, count: int, pins: Pins) -> np.ndarray:
    """Places of the `count` pages that are taken of a row's, ascending, int32: pinned ones before others, then those of
    the largest scores, of equal ones the first. scores [row_pages]."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    pinned = pins.pinned(len(scores))[order]
    return np.sort(np.concatenate([order[pinned], order[~pinned]])[:count]).astype(np.int32)


def top_share(weights: np.ndarray, share: float, pins: Pins, *, least_pages: int = 0) -> np.ndarray:
    """Places of the fewest pages that hold `share` of the weight (top p), pinned ones always among them, ascending.

    weights [row_pages], none negative. The page that passes the share is taken.
    """
    weights = np.asarray(weights, np.float64)
    pinned = pins.pinned(len(weights))
    order = np.lexsort((np.arange(len(weights)), -weights, ~pinned))
    total = np.cumsum(weights[order])
    count = int(np.searchsorted(total, share * weights.sum())) + 1
    return np.sort(order[: max(count, int(pinned.sum()), least_pages)]).astype(np.int32)


def softmax_mean(logits: np.ndarray) -> np.ndarray:
    """Softmax over pages (the last axis), then the mean over the group's query heads [group_size, row_pages]."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)


def lists_of(chosen: list[list[np.ndarray]], max_selected: int | None = None) -> PageList:
    """A PageList of the places of each row and KV head; entries past them are -1.

    max_selected: room of each list, by default the longest one's; ValueError where one is longer.
    """
    counts = np.array([[len(places) for places in row] for row in chosen], np.int32).reshape(len(chosen), -1)
    longest = int(counts.max(initial=0))
    room = max(1, longest) if max_selected is None else max_selected
    if longest > room:
        raise ValueError(f"max_selected: expected at least {longest}, got {max_selected}")
    pages = np.full((*counts.shape, room), -1, np.int32)
    for (row, head), count in np.ndenumerate(counts):
        pages[row, head, :count] = chosen[row][head]
    return PageList(pages, counts)
