"""What a running request may take of blocks that others use as well, while some of these wait for loads.

A request that waits holds blocks that it has not computed when those behind it run; without loads those ahead have
always computed, or compute in the same step, what those behind them find.
"""
from __future__ import annotations

import numpy as np

from pkvsim.serving.state import NUM_CHUNKS, NUM_RUNNING, PREFILLING, Requests, SchedulerState


def computed_tokens(requests: Requests, state: SchedulerState, place: int, page_size: int) -> int:
    """Tokens of a request's blocks up to the first that another one has still to load, or to compute after the planned
    step; all that are to be there where there is none. Blocks are of a page each."""
    offsets, ids, counts = requests.blocks.offsets, requests.blocks.ids, state.counts
    covered = {int(state.chunk_request[at]): int(state.chunk_tokens[at]) for at in range(counts[NUM_CHUNKS])}
    missing = [
        ids[offsets[other] + (int(state.cached[other]) + covered.get(other, 0)) // page_size : offsets[other + 1]]
        for other in state.running[: counts[NUM_RUNNING]].tolist()
        if other != place and state.phase[other] == PREFILLING
    ]  # fmt: skip
    own = ids[offsets[place] : offsets[place + 1]]
    is_missing = np.isin(own, np.concatenate(missing)) if missing else np.zeros(len(own), bool)
    return int(is_missing.argmax()) * page_size if is_missing.any() else int(state.target[place])


def first_shared(requests: Requests, state: SchedulerState, place: int, begin: int, num_pages: int) -> int:
    """The first of a request's pages from `begin` on that another one uses as well, num_pages where there is none."""
    blocks = requests.blocks
    behind = blocks.ids[blocks.offsets[place] + begin : blocks.offsets[place + 1]]
    is_shared = state.pool.users[behind] > 1
    return begin + int(is_shared.argmax()) if is_shared.any() else num_pages
