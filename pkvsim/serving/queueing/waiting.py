"""Requests that were sent and do not run: a heap by rank, then by the order in which they were sent. Compiled.

What a rank says is pkvsim.serving.orders' matter; the request of the least rank runs first.
"""
from __future__ import annotations

from pkvsim.compiled import inner
from pkvsim.serving.state import NUM_WAITING


@inner
def before(state, one, other):
    """Whether `one` goes before `other`."""
    rank, place = state.rank, state.clients.place
    return rank[one] < rank[other] or (rank[one] == rank[other] and place[one] < place[other])


@inner
def wait(state, request):
    """Adds a request to those that wait."""
    state.counts[NUM_WAITING] += 1
    _put(state, state.counts[NUM_WAITING] - 1, request)


@inner
def leave(state, at):
    """Removes the request at place `at` of the heap."""
    state.counts[NUM_WAITING] -= 1
    last = state.waiting[state.counts[NUM_WAITING]]
    if at < state.counts[NUM_WAITING]:
        _put(state, at, last)


@inner
def _put(state, at, request):
    """Puts a request near place `at`, where it belongs."""
    heap, size = state.waiting, state.counts[NUM_WAITING]
    while at > 0 and before(state, request, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    while True:
        child = 2 * at + 1
        if child + 1 < size and before(state, heap[child + 1], heap[child]):
            child += 1
        if child >= size or not before(state, heap[child], request):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = request
