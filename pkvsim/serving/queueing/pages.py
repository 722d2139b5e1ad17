"""What a request holds of the pool, while it runs and, where its KV is kept for the next turn, after. Compiled.

KV is kept for limits.hold_us after a request's end where another one follows it and begins with its tokens. It goes
when the follower was not sent by then, before a running request would have to give way, and where nothing could run
otherwise; the latest goes first.
"""
from __future__ import annotations

from pkvsim.compiled import inner
from pkvsim.memory.prefix_cache import free, release
from pkvsim.serving.state import NUM_HELD, POOL_FULL, SERVED


@inner
def private_pages_of(shared, page_size, request, tokens):
    """Pages beside the prompt's blocks that `tokens` cached tokens of a request need. Called for every row of every
    step: it takes the array that it reads, as each one that a call is given costs time."""
    return (max(0, tokens - shared[request]) + page_size - 1) // page_size


@inner
def give_back(requests, limits, state, request):
    """Gives a request's pages back."""
    state.counts[POOL_FULL] = 0
    free(state.pool, state.private_pages[request])
    state.private_pages[request] = 0
    release(state.pool, requests.blocks, limits.cache_kind, request, state.cached[request])


@inner
def hold(requests, limits, state, request):
    """Keeps the pages of a request that has ended, where they may be of use; whether it does."""
    if limits.hold_us <= 0 or not len(state.clients.after):
        return False
    follower = state.clients.first_follower[request]
    if follower < 0 or requests.rejected[follower] != SERVED:
        return False
    if requests.prompt[follower] <= state.cached[request]:
        return False
    state.held[state.counts[NUM_HELD]] = request
    state.counts[NUM_HELD] += 1
    state.counts[POOL_FULL] = 0
    return True


@inner
def held_for(state, request):
    """Place in `held` of the KV that is kept for a request, -1 where none is."""
    if state.counts[NUM_HELD] == 0:
        return -1
    for at in range(state.counts[NUM_HELD]):
        if state.clients.first_follower[state.held[at]] == request:
            return at
    return -1


@inner
def drop(requests, limits, state, at):
    """Gives back what is kept at place `at` of `held`."""
    give_back(requests, limits, state, state.held[at])
    state.counts[NUM_HELD] -= 1
    for place in range(at, state.counts[NUM_HELD]):
        state.held[place] = state.held[place + 1]


@inner
def expire(requests, limits, state, now_us):
    """Drops what was kept for followers that did not come in time."""
    for at in range(state.counts[NUM_HELD] - 1, -1, -1):
        until_us = state.finish_us[state.held[at]] + limits.hold_us
        sent_us = state.clients.sent_us[state.clients.first_follower[state.held[at]]]
        if now_us > until_us and not sent_us <= until_us:  # not sent: NaN
            drop(requests, limits, state, at)
