"""Who gives way: pages for the next tokens of those that run, at the cost of the last of them, and requests that end
before their time. Compiled, for pkvsim.serving.scheduling."""
from __future__ import annotations

from pkvsim.compiled import compiled, inner
from pkvsim.memory.prefix_cache import allocate
from pkvsim.serving.orders import SHORTEST
from pkvsim.serving.queueing.clients import end
from pkvsim.serving.queueing.pages import drop, give_back, private_pages_of
from pkvsim.serving.queueing.waiting import before, leave, wait
from pkvsim.serving.state import (
    DECODING,
    FINISHED,
    JUST_PREEMPTED,
    LEAVING,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_HELD,
    NUM_RUNNING,
    POOL_FULL,
    PREEMPTED,
    PREFILLING,
)


@inner
def grow(requests, limits, state, now_us):
    """Gives every decoding request the pages of its next tokens, drafts among them, at the cost of the last when none
    is free."""
    counts, shared = state.counts, requests.shared
    at = 0
    while at < counts[NUM_RUNNING]:
        request = state.running[at]
        if state.phase[request] == DECODING:
            tokens = 1
            if limits.query_tokens > 1:  # no draft lies beyond the end of an answer
                tokens = min(limits.query_tokens, requests.output[request] - state.generated[request])
            # Most rows have room for their tokens, which takes a product to see and no division.
            room = (state.private_pages[request] - limits.state_pages) * limits.page_size
            if max(0, state.cached[request] + tokens - shared[request]) > room:
                need = private_pages_of(shared, limits.page_size, request, state.cached[request] + tokens)
                need += limits.state_pages - state.private_pages[request]
                at -= make_room(requests, limits, state, at, need, now_us)
        at += 1


@inner
def make_room(requests, limits, state, at, need, now_us):
    """Gives the request at `at` of `running` `need` pages, at the cost of the last when none is free; returns how many
    at or before it gave way. It may have done so itself."""
    request, gone = state.running[at], 0
    while not allocate(state.pool, requests.blocks, need):
        if state.counts[NUM_HELD] > 0:
            drop(requests, limits, state, state.counts[NUM_HELD] - 1)
            continue
        place = _last(requests, limits, state)
        _preempt(requests, limits, state, place, now_us)
        gone += place <= at - gone
        if state.phase[request] == PREEMPTED:
            return gone
    state.private_pages[request] += need
    return gone


@inner
def _last(requests, limits, state):
    """Where in `running` the request is that gives way first."""
    if limits.order == SHORTEST:
        for at in range(state.counts[NUM_RUNNING]):
            request = state.running[at]
            state.rank[request] = requests.output[request] - state.generated[request]
    last = -1
    for at in range(state.counts[NUM_RUNNING] - 1, -1, -1):
        if state.phase[state.running[at]] == LEAVING:
            continue
        if last < 0 or before(state, state.running[last], state.running[at]):
            last = at
    return last


@inner
def _preempt(requests, limits, state, place, now_us):
    """Lets the request at `place` of `running` wait again; its pages go, its tokens stay."""
    counts, request = state.counts, state.running[place]
    if state.phase[request] == DECODING:
        state.paused_us[request] = now_us
    elif limits.by_chunk:  # the step may have a chunk of it already
        _drop_chunk(state, request)
    give_back(requests, limits, state, request)
    _stop(state, place)
    state.phase[request] = PREEMPTED
    state.cached[request] = 0
    state.preemptions[request] += 1
    state.preempted[counts[JUST_PREEMPTED]] = request
    counts[JUST_PREEMPTED] += 1
    wait(state, request)


@inner
def _stop(state, place):
    """Takes the request at `place` of `running` out of those that run."""
    counts, request = state.counts, state.running[place]
    counts[NUM_RUNNING] -= 1
    for at in range(place, counts[NUM_RUNNING]):
        state.running[at] = state.running[at + 1]
    if state.phase[request] == DECODING:
        at = 0
        while state.decoding[at] != request:
            at += 1
        counts[NUM_DECODING] -= 1
        for later in range(at, counts[NUM_DECODING]):
            state.decoding[later] = state.decoding[later + 1]


@compiled
def cancel(requests, limits, state, request, now_us):
    """Ends a request that was taken in and has not finished, wherever it stands. Between steps."""
    at = 0
    if state.phase[request] == PREFILLING or state.phase[request] == DECODING:
        while state.running[at] != request:
            at += 1
        give_back(requests, limits, state, request)
        _stop(state, at)
    else:
        while state.waiting[at] != request:
            at += 1
        leave(state, at)
    state.phase[request] = FINISHED
    state.finish_us[request] = now_us
    state.counts[POOL_FULL] = 0
    end(state.clients, request, now_us)


@inner
def _drop_chunk(state, request):
    counts, kept = state.counts, 0
    for at in range(counts[NUM_CHUNKS]):
        if state.chunk_request[at] != request:
            state.chunk_request[kept] = state.chunk_request[at]
            state.chunk_begin[kept] = state.chunk_begin[at]
            state.chunk_tokens[kept] = state.chunk_tokens[at]
            kept += 1
    counts[NUM_CHUNKS] = kept
