"""The highest rate that a server keeps up with: of two rates close together it keeps one and misses the other."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# From the rate at which the search begins on, it goes down by these factors until a rate is kept, and up by those until
# one is missed. Most servers keep half of what they serve with a full queue, and none keeps much more than that.
DOWN = (0.5, 1 / 64, 1 / 4096)
UP = (1.25, 4.0, 64.0, 4096.0)
# A rate beside the expected edge is tried, by this part of the tolerance, such that the two about it are a bracket.
ASIDE = 0.45
NEAR_TRIES = 4  # about where the edge is expected, before the factors from the start on

Keeps = Callable[[float], bool]
Edge = Callable[[float | None, float | None], float | None]


@dataclass(frozen=True, slots=True)
class Bracket:
    """Two rates that were tried: `kept` and, at most the tolerance above, `missed`."""

    kept: float | None  # None: not even the lowest rate was kept
    missed: float | None  # None: the highest rate was kept as well


def highest_kept(
    keeps: Keeps, start: float, tolerance: float, *, edge: Edge | None = None, near: float | None = None
) -> Bracket:
    """The bracket that is found from `start` on, about what the server serves with a full queue; both its ends tried.

    keeps: whether a rate is kept; each rate is asked for once. Where that is no monotone function of the rate, as a
    trace's bursts may have it, the bracket holds one of its edges. tolerance: the missed rate is at most
    1 + tolerance times the kept one.
    edge(kept, missed): where between these, of which one may be None, the edge is expected by what was tried, None for
    nowhere; right ones save tries, and wrong ones cost at most as many again. near: where it is expected before
    anything was tried.
    """
    kept = missed = None
    aside = (1 + tolerance) ** ASIDE
    for _ in range(NEAR_TRIES if near is not None else 0):
        expected = near if kept is None and missed is None else edge and edge(kept, missed)
        if not expected or (kept is not None and missed is not None):
            break
        rate = expected / aside if kept is None else expected * aside
        if (kept is not None and rate <= kept) or (missed is not None and rate >= missed):
            break
        if keeps(rate):
            kept = rate
        else:
            missed = rate
    kept, missed = _ends(keeps, start, kept, missed)
    if kept is None or missed is None:
        return Bracket(kept, missed)
    halve = False
    while missed > kept * (1 + tolerance):
        middle = (kept * missed) ** 0.5
        rate = middle if halve or edge is None else _beside(edge(kept, missed), kept, missed, aside)
        wide = math.log(missed / kept)
        if keeps(rate):
            kept = rate
        else:
            missed = rate
        halve = not halve and math.log(missed / kept) > wide / 2
    return Bracket(kept, missed)


def _ends(
    keeps: Keeps, start: float, kept: float | None, missed: float | None
) -> tuple[float | None, float | None]:
    """A kept rate and a missed one, by the factors from start on where they are not known."""
    for rate in _beyond(DOWN, start, missed) if kept is None else ():
        if keeps(rate):
            kept = rate
            break
        missed = rate
    for rate in _beyond(UP, start, kept) if missed is None else ():
        if not keeps(rate):
            missed = rate
            break
        kept = rate
    return kept, missed


def _beyond(factors: Sequence[float], start: float, known: float | None) -> list[float]:
    """The rates by these factors that lie beyond one that was tried."""
    rates = [start * factor for factor in factors]
    return [rate for rate in rates if known is None or (rate < known) == (factors[-1] < 1) and rate != known]


def _beside(expected: float | None, kept: float, missed: float, aside: float) -> float:
    """A rate beside the expected edge, on the side of the end that is farther from it; the middle where it is none."""
    if expected is None or not kept <= expected <= missed:  # a rate that was tried may be the very edge
        return (kept * missed) ** 0.5
    rate = expected / aside if expected / kept > missed / expected else expected * aside
    return rate if kept < rate < missed else (kept * missed) ** 0.5
