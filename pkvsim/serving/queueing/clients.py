"""Who sends which request when: at its arrival, after the answer that it follows, or when a slot is free. Compiled.

A request is due at its arrival or, where it follows another, think_us after the end of that one, whichever is later;
both as the server's queue sees them: turnaround_us lies between an end and what its client sends at once.
What is due is sent in order of due times, ties in trace order, while fewer than `concurrency` sent requests are
unfinished. A request that cannot be served is refused as it is sent: that is its end.
"""
from __future__ import annotations

import math

from pkvsim.compiled import compiled, inner
from pkvsim.serving.state import IN_FLIGHT, NEXT_ARRIVAL, NEXT_SEND, NUM_DUE, NUM_SENT, SERVED


@inner
def next_request(clients):
    """The request that is due first, -1 where none is; NEXT_ARRIVAL skips what follows others."""
    counts, n = clients.counts, len(clients.due_us)
    if len(clients.after):
        while counts[NEXT_ARRIVAL] < n and clients.after[counts[NEXT_ARRIVAL]] >= 0:
            counts[NEXT_ARRIVAL] += 1
    at = counts[NEXT_ARRIVAL]
    if counts[NUM_DUE] == 0:
        return at if at < n else -1
    first = clients.due[0]
    return first if at == n or _earlier(clients, first, at) else at


@inner
def _earlier(clients, one, other):
    return clients.due_us[one] < clients.due_us[other] or (clients.due_us[one] == clients.due_us[other] and one < other)


@compiled
def next_send_us(clients):
    """When the next request is sent, as far as is known: infinity where none is due, or none before one has ended."""
    if clients.concurrency and clients.counts[IN_FLIGHT] >= len(clients.free_us):
        return math.inf
    request = next_request(clients)
    return max(clients.due_us[request], _slot_us(clients)) if request >= 0 else math.inf


@inner
def _slot_us(clients):
    """Since when the slot that was the first to become free is free, as the queue sees it."""
    return clients.free_us[0] if clients.concurrency else 0.0


@compiled
def send(clients):
    """Sends the request that next_send_us speaks of, and returns it."""
    counts = clients.counts
    request = next_request(clients)
    if counts[NUM_DUE] and clients.due[0] == request:
        counts[NUM_DUE] -= 1
        if counts[NUM_DUE]:
            _sink(clients, clients.due[counts[NUM_DUE]])
    else:
        counts[NEXT_ARRIVAL] += 1
    clients.sent_us[request] = max(clients.due_us[request], _slot_us(clients))
    if clients.concurrency:
        _take_slot(clients)
    clients.place[request] = counts[NUM_SENT]
    counts[NUM_SENT] += 1
    counts[IN_FLIGHT] += 1
    if clients.rejected[request] != SERVED:
        end(clients, request, clients.sent_us[request])
    return request


@compiled
def end(clients, request, now_us):
    """A sent request has ended: its slot is free, and what follows it is due once its client has thought."""
    counts = clients.counts
    if clients.concurrency:
        _free_slot(clients, now_us + clients.turnaround_us)
    counts[IN_FLIGHT] -= 1
    if clients.concurrency or len(clients.after):
        clients.times[NEXT_SEND] = 0.0
    if not len(clients.after):
        return
    follower = clients.first_follower[request]
    while follower >= 0:
        next_us = now_us + clients.turnaround_us + clients.think_us[follower]
        clients.due_us[follower] = max(clients.due_us[follower], next_us)
        at = counts[NUM_DUE]
        counts[NUM_DUE] += 1
        while at > 0 and _earlier(clients, follower, clients.due[(at - 1) // 2]):
            clients.due[at] = clients.due[(at - 1) // 2]
            at = (at - 1) // 2
        clients.due[at] = follower
        follower = clients.next_follower[follower]


@inner
def _take_slot(clients):
    """Takes the first of the heap of free slots, which are those that no sent request has."""
    free, at = clients.free_us, 0
    size = len(free) - clients.counts[IN_FLIGHT] - 1
    while True:
        child = 2 * at + 1
        if child + 1 < size and free[child + 1] < free[child]:
            child += 1
        if child >= size or free[child] >= free[size]:
            break
        free[at] = free[child]
        at = child
    free[at] = free[size]


@inner
def _free_slot(clients, free_us):
    """Ends of requests need not come in the order of their times: a step's tokens may be handed on late."""
    free = clients.free_us
    at = len(free) - clients.counts[IN_FLIGHT]
    while at > 0 and free_us < free[(at - 1) // 2]:
        free[at] = free[(at - 1) // 2]
        at = (at - 1) // 2
    free[at] = free_us


@inner
def _sink(clients, request):
    """Puts a request in place of the first of the heap `due`."""
    at, size = 0, clients.counts[NUM_DUE]
    while True:
        child = 2 * at + 1
        if child + 1 < size and _earlier(clients, clients.due[child + 1], clients.due[child]):
            child += 1
        if child >= size or not _earlier(clients, clients.due[child], request):
            break
        clients.due[at] = clients.due[child]
        at = child
    clients.due[at] = request
