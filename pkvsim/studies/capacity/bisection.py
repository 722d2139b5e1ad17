"""The highest rate that a server keeps up with, by bisection between a rate that it keeps and one that it misses."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# From the rate at which the search begins on, it goes down by these factors until a rate is kept, and up by those until
# one is missed. Most servers keep half of what they serve with a full queue, and none keeps much more than that.
DOWN = (0.5, 1 / 64, 1 / 4096)
UP = (1.25, 4.0, 64.0, 4096.0)


@dataclass(frozen=True, slots=True)
class Bracket:
    """Two rates that were tried: `kept` and, at most the tolerance above, `missed`."""

    kept: float | None  # None: not even the lowest rate was kept
    missed: float | None  # None: the highest rate was kept as well


def highest_kept(keeps: Callable[[float], bool], start: float, tolerance: float) -> Bracket:
    """The bracket about a rate near `start`, both its ends tried.

    keeps: whether a rate is kept; each rate is asked for once. Where that is no monotone function of the rate, as a
    trace's bursts may have it, the bracket holds one of its edges. tolerance: the missed rate is at most
    1 + tolerance times the kept one.
    """
    kept = missed = None
    for factor in DOWN:
        if keeps(start * factor):
            kept = start * factor
            break
        missed = start * factor
    if kept is None:
        return Bracket(None, missed)
    for factor in UP if missed is None else ():
        if not keeps(start * factor):
            missed = start * factor
            break
        kept = start * factor
    if missed is None:
        return Bracket(kept, None)
    while missed > kept * (1 + tolerance):
        middle = (kept * missed) ** 0.5
        if keeps(middle):
            kept = middle
        else:
            missed = middle
    return Bracket(kept, missed)
