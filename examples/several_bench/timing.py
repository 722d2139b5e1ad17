"""How many calls graphs of several ranks hold, and what their replays say of a call's time. Needs no GPU."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Ranks start a few us apart at best, and wait for the last one in their first call: 5 us are 0.08 us a call of 64, and
# an eighth of a percent of 4 ms.
MIN_CALLS = 64
MIN_GRAPH_US = 4000.0
MAX_GRAPH_US = 50_000.0  # longer graphs of more rounds than one tell nothing more, and the bench is to stay short


def rounds_of_graph(round_us: float, *, layers: int) -> int:
    """How often a graph holds the calls of all layers, which take round_us together: at least MIN_CALLS calls and
    MIN_GRAPH_US, where MAX_GRAPH_US allows it, and at least once."""
    wanted = max(math.ceil(MIN_CALLS / layers), math.ceil(MIN_GRAPH_US / round_us))
    return max(1, min(wanted, int(MAX_GRAPH_US // round_us)))


@dataclass(frozen=True, slots=True)
class WayTime:
    """us of a call."""

    median_us: float  # over the replays, of each the slowest rank's
    largest_us: float
    by_rank_us: tuple[float, ...]  # each rank's median, of those that ran anything, ascending by rank
    calls: int  # of a graph
    apart: bool = False  # the host was late, and ranks may have started one after the other

    @classmethod
    def of(cls, times_us: np.ndarray, *, calls: int, apart: bool = False) -> WayTime:
        """times_us [repeats, num_ranks]: of a graph of so many calls, 0 of a rank that ran nothing."""
        each = times_us[:, times_us.max(0) > 0] / calls
        slowest = each.max(1)
        return cls(float(np.median(slowest)), float(slowest.max()), tuple(np.median(each, 0).tolist()), calls, apart)
