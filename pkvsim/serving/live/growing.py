"""The scheduler's arrays with room for requests that come one by one, and their moves to larger or tidier ones."""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pkvsim.memory.prefix_cache import HEAP_SIZE, PagePool, PromptBlocks
from pkvsim.serving.state import (
    NUM_DECODING,
    NUM_RUNNING,
    NUM_WAITING,
    SERVED,
    Limits,
    Requests,
    SchedulerState,
    new_scheduler_state,
)

FEWEST_REQUESTS = 64  # that there is room for
OF_REQUESTS = ("arrival_us", "prompt", "output", "rejected", "shared", "rank")
OF_STATE = (
    "phase", "rank", "paused_us", "cached", "target", "generated", "private_pages", "start_us", "first_token_us",
    "finish_us", "preemptions", "hit_blocks", "hit_tokens",
)  # fmt: skip
OF_CLIENTS = ("sent_us", "place")


class Room(NamedTuple):
    """How many there is room for."""

    requests: int
    ids: int  # of blocks, of all requests together
    blocks: int


def room_for(requests: int, ids: int, blocks: int) -> Room:
    """At least twice as much as that, so that arrays are seldom moved."""

    def doubled(needed: int) -> int:
        return 1 << (2 * needed - 1).bit_length() if needed else 0

    return Room(max(FEWEST_REQUESTS, doubled(requests)), doubled(ids), doubled(blocks))


def no_requests(page_size: int, room: Room) -> Requests:
    """Room for requests; none is due ever, as they are taken in one by one. Blocks are of a page each."""
    n = room.requests
    return Requests(
        arrival_us=np.full(n, math.inf),
        prompt=np.zeros(n, np.int64),
        output=np.zeros(n, np.int64),
        rejected=np.full(n, SERVED, np.int8),
        blocks=PromptBlocks(
            offsets=np.zeros(n + 1, np.int64),
            ids=np.zeros(room.ids, np.int32),
            next_request=np.full(room.ids, n, np.int64),
            tokens=np.full(room.blocks, page_size, np.int32),
            pages=np.ones(room.blocks, np.int32),
        ),
        shared=np.zeros(n, np.int64),
        after=np.zeros(0, np.int32),
        think_us=np.zeros(0),
        concurrency=0,
        rank=np.zeros(n),
    )


def empty_state(requests: Requests, limits: Limits) -> SchedulerState:
    """Nothing has arrived; a step has room for max_batch requests, however few there are yet."""
    running, decoding, preempted, request, begin, tokens = np.zeros((6, limits.max_batch), np.int64)
    return new_scheduler_state(requests, limits)._replace(
        running=running, decoding=decoding, preempted=preempted, chunk_request=request, chunk_begin=begin,
        chunk_tokens=tokens,
    )  # fmt: skip


def moved(requests: Requests, state: SchedulerState, limits: Limits, live: np.ndarray, kept: np.ndarray,
          room: Room) -> tuple[Requests, SchedulerState]:
    """The requests `live` [n] int64, in that order, and the blocks `kept` [b] int64 at the beginning of new arrays.
    Between steps; whoever runs or waits is among the live, and what they or the pool hold among the kept."""
    new = no_requests(limits.page_size, room)
    place_of = np.full(len(requests.prompt), -1, np.int64)
    place_of[live] = np.arange(len(live))
    block_of = np.full(len(requests.blocks.tokens) + 1, -1, np.int32)
    block_of[kept] = np.arange(len(kept), dtype=np.int32)
    _copy(requests, new, OF_REQUESTS, live)
    at = 0
    for place, source in enumerate(live.tolist()):
        ids = requests.blocks.ids[requests.blocks.offsets[source] : requests.blocks.offsets[source + 1]]
        new.blocks.ids[at : at + len(ids)] = block_of[ids]
        at += len(ids)
        new.blocks.offsets[place + 1] = at
    new.blocks.offsets[len(live) :] = at
    found = empty_state(new, limits)
    found.counts[:] = state.counts
    _copy(state, found, OF_STATE, live)
    for name, count in (("running", NUM_RUNNING), ("decoding", NUM_DECODING), ("waiting", NUM_WAITING)):
        length = int(state.counts[count])
        getattr(found, name)[:length] = place_of[getattr(state, name)[:length]]
    _copy(state.clients, found.clients, OF_CLIENTS, live)
    found.clients.counts[:] = state.clients.counts
    if limits.tiers:
        found.gate.ready_us[: len(live)] = state.gate.ready_us[live]
    _move_pool(state.pool, found.pool, kept, block_of)
    return new, found


def _copy(old: NamedTuple, new: NamedTuple, names: tuple[str, ...], chosen: np.ndarray) -> None:
    for name in names:
        getattr(new, name)[: len(chosen)] = getattr(old, name)[chosen]


def _move_pool(old: PagePool, new: PagePool, kept: np.ndarray, block_of: np.ndarray) -> None:
    _copy(old, new, ("users", "key", "next_request"), kept)
    heap = block_of[old.heap[: old.counts[HEAP_SIZE]]]
    new.heap[: len(heap)] = heap
    new.place[heap] = np.arange(len(heap), dtype=np.int32)
    new.counts[:] = old.counts
