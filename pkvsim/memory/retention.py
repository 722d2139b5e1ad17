"""Which block a full device gives up, and which block is worth keeping at all.

A retention policy knows the blocks of one device that may go: those that nobody reads, writes or holds. The pool adds a
block when its last user lets go and removes it when somebody takes it; `victim` names the next to go. An admission
policy decides whether a block may displace a victim. A time-to-live is a hold that ends by itself (`choose_ttl_s`).

Sources: TinyLFU, Einziger, Friedman, Manes, arXiv 1512.00727; time-to-live of KV across tool calls, Continuum,
arXiv 2511.02230; the farthest next use, Belady 1966.
"""
from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np

LRU_NAME, BELADY_NAME = "lru", "belady"
RETENTIONS = (LRU_NAME, BELADY_NAME)
ADMISSIONS = ("all", "tinylfu")


class Retention(Protocol):
    """An order in which evictable blocks go."""

    def add(self, key: Hashable) -> None:
        """The block may go from here on; it was used last just before."""

    def remove(self, key: Hashable) -> None:
        """The block may not go, or is gone. KeyError where it was not evictable."""

    def victim(self) -> Hashable | None:
        """The block that goes next, left where it is; None where none may go."""

    def __len__(self) -> int: ...


class Lru:
    """The block unused for longest goes first. Whoever adds a prefix's deepest block first keeps prefixes whole."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, key: Hashable) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def remove(self, key: Hashable) -> None:
        del self._order[key]

    def victim(self) -> Hashable | None:
        return next(iter(self._order), None)

    def __len__(self) -> int:
        return len(self._order)


class Belady:
    """The block whose next use is farthest away goes first: no order does better where every block costs the same.

    next_use(key): when the block is next asked for, as of its last use; infinity where never. The simulator's bound,
    since only a trace knows that. Of blocks that tie, the one added first goes first.
    """

    __slots__ = ("_next_use", "_heap", "_ticket", "_tickets")

    def __init__(self, next_use: Callable[[Hashable], float]) -> None:
        self._next_use = next_use
        self._heap: list[tuple[float, int, Hashable]] = []
        self._ticket: dict[Hashable, int] = {}  # of the evictable blocks; heap entries with another one are stale
        self._tickets = 0

    def add(self, key: Hashable) -> None:
        self._tickets += 1
        self._ticket[key] = self._tickets
        heapq.heappush(self._heap, (-self._next_use(key), self._tickets, key))

    def remove(self, key: Hashable) -> None:
        del self._ticket[key]

    def victim(self) -> Hashable | None:
        while self._heap and self._ticket.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def __len__(self) -> int:
        return len(self._ticket)


class AdmitAll:
    """Every block displaces the victim."""

    __slots__ = ()

    def seen(self, key: Hashable) -> None:
        """The block was asked for."""

    def admits(self, key: Hashable, victim: Hashable) -> bool:
        """Whether the block may take the victim's place."""
        return True


class TinyLfu:
    """A block displaces a victim only where it was asked for more often, by a count-min sketch that forgets.

    width: counters of each of 4 rows; counts are halved after 10 * width requests, so that old fame fades.
    """

    __slots__ = ("_counts", "_width", "_until_halving")

    ROWS, SAMPLE = 4, 10

    def __init__(self, width: int = 2**16) -> None:
        if width < 1 or width & (width - 1):
            raise ValueError(f"width: expected a power of two, got {width}")
        self._width = width
        self._counts = np.zeros((self.ROWS, width), np.uint32)
        self._until_halving = self.SAMPLE * width

    def _places(self, key: Hashable) -> list[int]:
        # Odd multipliers of 64 bits (those of splitmix64 and its kin) make four hashes of one.
        value = hash(key) & 0xFFFFFFFFFFFFFFFF
        multipliers = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
        return [(value * m >> 24) % self._width for m in multipliers]

    def seen(self, key: Hashable) -> None:
        for row, place in enumerate(self._places(key)):
            self._counts[row, place] += 1
        self._until_halving -= 1
        if self._until_halving == 0:
            self._counts >>= 1
            self._until_halving = self.SAMPLE * self._width // 2

    def frequency(self, key: Hashable) -> int:
        """At least the requests for the block since they were last halved."""
        return min(int(self._counts[row, place]) for row, place in enumerate(self._places(key)))

    def admits(self, key: Hashable, victim: Hashable) -> bool:
        return self.frequency(key) > self.frequency(victim)


GAPS_KEPT = 1000  # between turns, that a time-to-live is chosen by


def choose_ttl_s(
    gaps_s: Sequence[float] | np.ndarray, *, benefit_s: float, cost_s_per_s: float, longest_s: float = 60.0
) -> float:
    """For how long to hold a session's blocks after a turn: 0 where that does not pay.

    Continuum (arXiv 2511.02230) keeps KV over a tool call for a time that weighs the reload and the queueing that a
    next turn is spared against the memory that is held, from what calls of this tool took before. Here: of 0 and the
    gaps seen, the t that maximises P(gap <= t) * benefit_s - E[min(gap, t)] * cost_s_per_s. gaps_s: seconds between
    turns seen so far; benefit_s: what a hit spares; cost_s_per_s: what others lose for each second of holding.
    """
    gaps = np.sort(np.asarray(gaps_s, np.float64))
    gaps = gaps[gaps >= 0]
    candidates = gaps[gaps <= longest_s]
    if not len(candidates):
        return 0.0
    within = np.searchsorted(gaps, candidates, side="right")
    held = np.concatenate(([0.0], np.cumsum(gaps)))[within] + candidates * (len(gaps) - within)
    gain = (within * benefit_s - held * cost_s_per_s) / len(gaps)
    best = int(np.argmax(gain))
    return float(candidates[best]) if gain[best] > 0 else 0.0
