"""Who runs in a step, who waits, who gives way. Compiled; pkvsim.serving.scheduler is the way in from Python.

A step computes one token of every request past prefill, or checks its drafts (pkvsim.serving.queueing.drafts), and,
with what is left of step_tokens, chunks of prompts in order of admission. Admission takes the first of those that wait
(pkvsim.serving.queueing), and preemption the running one that would be the last of them; it waits again. `decoding`
stays sorted by length without sorting, because all its rows grow by one token a step; where drafts are checked it is
sorted again.
"""
from __future__ import annotations

import math

from pkvsim.compiled import compiled, drop_stale, inner
from pkvsim.memory.prefix_cache import acquire, resident_prefix
from pkvsim.serving.orders import KVSHARE
from pkvsim.serving.queueing.clients import end, next_request, next_send_us, send
from pkvsim.serving.queueing.drafts import tokens_of_step
from pkvsim.serving.queueing.giving_way import grow, make_room
from pkvsim.serving.queueing.pages import drop, expire, give_back, held_for, hold, private_pages_of
from pkvsim.serving.queueing.waiting import before, leave, wait
from pkvsim.serving.state import (
    DECODING,
    FINISHED,
    FIRST_ADMITTED,
    JUST_PREEMPTED,
    LEAVING,
    NEXT_SEND,
    NUM_BEGINNING,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_HELD,
    NUM_LEAVING,
    NUM_RUNNING,
    NUM_WAITING,
    POOL_FULL,
    PREFILLING,
    ROWS_WAIT,
    SERVED,
    WAITING,
)
from pkvsim.serving.tier_gate import ask, is_ready


@compiled
def next_work_us(state, now_us):
    """now_us where a request runs or waits, else when the next one is sent, infinity after the last. Takes in what is
    sent until now_us."""
    clients = state.clients
    send_us = next_send_us(clients)
    idle = state.counts[NUM_RUNNING] == 0 and state.counts[NUM_WAITING] == 0
    while send_us <= now_us or (idle and send_us < math.inf and clients.rejected[next_request(clients)] != SERVED):
        request = send(clients)
        if clients.rejected[request] == SERVED:
            take_in(state, request)
            idle = False
        send_us = next_send_us(clients)
    clients.times[NEXT_SEND] = send_us
    return send_us if idle else now_us


@compiled
def take_in(state, request):
    """A request that is to be served has been sent to this server."""
    wait(state, request)
    if state.waiting[0] == request or state.finds_hits:
        state.counts[POOL_FULL] = 0


@compiled
def forget(requests, limits, state, request):
    """Drops the KV that was kept for a request that another server serves."""
    held = held_for(state, request)
    if held >= 0:
        drop(requests, limits, state, held)


@compiled
def plan_step(requests, limits, state, now_us):
    """Makes a step of those that decode, of further chunks of those in prefill, and of whom there is room to admit.
    Whether anything is to run: nothing is where all that run are leaving, or where the only one gave way."""
    counts = state.counts
    counts[NUM_CHUNKS] = counts[JUST_PREEMPTED] = counts[ROWS_WAIT] = 0
    if counts[NUM_HELD] > 0:
        expire(requests, limits, state, now_us)
    grow(requests, limits, state, now_us)
    tokens = 0
    if counts[NUM_DECODING] < counts[NUM_RUNNING]:
        tokens = _continue_prefills(requests, limits, state, now_us)
    counts[FIRST_ADMITTED] = counts[NUM_CHUNKS]
    if counts[JUST_PREEMPTED] == 0 and counts[POOL_FULL] == 0:
        _admit(requests, limits, state, _budget(limits, counts) - tokens, now_us)
    if not limits.mixes and counts[NUM_CHUNKS] > 0:
        counts[ROWS_WAIT] = 1
    return counts[NUM_CHUNKS] > 0 or counts[NUM_DECODING] > 0


@inner
def _budget(limits, counts):
    """Tokens of prompts that a step has room for."""
    return limits.step_tokens - (counts[NUM_DECODING] * limits.query_tokens if limits.mixes else 0)


@inner
def _add_chunk(state, request, begin, tokens):
    at = state.counts[NUM_CHUNKS]
    state.chunk_request[at] = request
    state.chunk_begin[at] = begin
    state.chunk_tokens[at] = tokens
    state.counts[NUM_CHUNKS] += 1


@inner
def _continue_prefills(requests, limits, state, now_us):
    """Chunks of the running requests that are not past prefill and wait for no blocks; their tokens."""
    counts, at, tokens = state.counts, 0, 0
    while at < counts[NUM_RUNNING]:
        request = state.running[at]
        room = _budget(limits, counts) - tokens
        if state.phase[request] == PREFILLING and room > 0 and is_ready(state.gate, request, now_us):
            chunk = min(room, state.target[request] - state.cached[request])
            if limits.by_chunk:
                need = private_pages_of(requests.shared, limits.page_size, request, state.cached[request] + chunk)
                need += limits.state_pages - state.private_pages[request]
                if need > 0:
                    at -= make_room(requests, limits, state, at, need, now_us)
            if state.phase[request] == PREFILLING:
                _add_chunk(state, request, state.cached[request], chunk)
            tokens = 0  # others may have given way
            for planned in range(counts[NUM_CHUNKS]):
                tokens += state.chunk_tokens[planned]
        at += 1
    return tokens


@inner
def _best_hit(requests, state):
    """Where in `waiting` the request is of whose prompt the largest part is cached; ties as they were sent."""
    best, best_share = 0, -1.0
    for at in range(state.counts[NUM_WAITING]):
        request = state.waiting[at]
        share = resident_prefix(state.pool, requests.blocks, request)[1] / requests.prompt[request]
        if share > best_share or (share == best_share and before(state, request, state.waiting[best])):
            best, best_share = at, share
    return best


@inner
def _admit(requests, limits, state, budget, now_us):
    """Admits those that wait while tokens, rows and pages last."""
    counts = state.counts
    tokens = 0
    while tokens < budget and counts[NUM_RUNNING] < len(state.running) and counts[NUM_WAITING] > 0:
        place = _best_hit(requests, state) if limits.order == KVSHARE else 0
        request = state.waiting[place]
        target = requests.prompt[request] + state.generated[request]
        hit_blocks, hit_tokens = resident_prefix(state.pool, requests.blocks, request)
        if len(requests.remote) > 0 and state.phase[request] == WAITING:
            hit_tokens = max(hit_tokens, requests.remote[request])
        held, previous, carried = held_for(state, request), -1, 0
        if held >= 0:
            previous = state.held[held]
            hit_tokens = max(hit_tokens, state.cached[previous])
            if requests.blocks.offsets[request] == requests.blocks.offsets[request + 1]:
                carried = state.private_pages[previous]
        hit_tokens = min(hit_tokens, target - 1)
        chunk = min(budget - tokens, target - hit_tokens)
        asked = hit_tokens + chunk if limits.by_chunk and not limits.tiers else target
        if limits.reserve_output > 0:
            left = requests.output[request] - state.generated[request]
            asked = target + int(limits.reserve_output * (left - 1))  # the last token is never cached
        private = private_pages_of(requests.shared, limits.page_size, request, asked)
        private = max(private + limits.state_pages, carried)
        keep_free = limits.keep_free if counts[NUM_RUNNING] > 0 else 0
        if not acquire(state.pool, requests.blocks, limits.cache_kind, request, private - carried, keep_free):
            if counts[NUM_RUNNING] == 0 and counts[NUM_HELD] > 0:
                drop(requests, limits, state, counts[NUM_HELD] - 1)
                continue
            if not limits.by_chunk:  # a smaller chunk may find its pages
                counts[POOL_FULL] = 1  # until somebody gives pages back
            break
        if held >= 0:
            state.private_pages[previous] -= carried
            drop(requests, limits, state, held)
        leave(state, place)
        if state.phase[request] == WAITING:
            state.start_us[request] = now_us
            state.hit_blocks[request] = hit_blocks
            state.hit_tokens[request] = hit_tokens
        state.running[counts[NUM_RUNNING]] = request
        counts[NUM_RUNNING] += 1
        state.phase[request] = PREFILLING
        state.target[request] = target
        state.private_pages[request] = private
        state.cached[request] = hit_tokens
        if ask(state.gate, request, now_us):  # its first chunk comes once its blocks are there
            break
        _add_chunk(state, request, hit_tokens, chunk)
        tokens += chunk


@compiled
def end_step(requests, limits, state, now_us):
    """Ends the planned step: tokens come out, finished requests leave, those past prefill start decoding. What was sent
    until then was taken in before."""
    commit_step(requests.output, limits, state)
    finish_step(requests, limits, state, now_us)


@compiled
def commit_step(output, limits, state):
    """What the planned step does to those that run, once it has begun: the step after it may be planned then. Who gets
    a first or a last token by it is known; finish_step says when."""
    counts = state.counts
    for at in range(counts[NUM_CHUNKS]):
        state.cached[state.chunk_request[at]] += state.chunk_tokens[at]
    counts[NUM_CHUNKS] = counts[NUM_BEGINNING] = counts[NUM_LEAVING] = 0
    for at in range(counts[NUM_RUNNING]):
        request = state.running[at]
        prefilled = state.phase[request] == PREFILLING
        if prefilled:
            if state.cached[request] < state.target[request]:
                continue
        elif counts[ROWS_WAIT]:
            continue
        else:
            given = state.generated[request]
            given = tokens_of_step(limits, request, given, output[request] - given) if limits.query_tokens > 1 else 1
            state.cached[request] += given
            state.generated[request] += given - 1
        state.generated[request] += 1
        if state.generated[request] == 1:
            state.beginning[counts[NUM_BEGINNING]] = request
            counts[NUM_BEGINNING] += 1
        if state.generated[request] == output[request]:
            state.phase[request] = LEAVING
            state.leaving[counts[NUM_LEAVING]] = request
            counts[NUM_LEAVING] += 1
        elif prefilled:
            state.phase[request] = DECODING
            _insert_by_length(state, request)
    if counts[NUM_LEAVING]:
        kept = 0
        for at in range(counts[NUM_DECODING]):
            if state.phase[state.decoding[at]] == DECODING:
                state.decoding[kept] = state.decoding[at]
                kept += 1
        counts[NUM_DECODING] = kept
    if limits.query_tokens > 1:
        _sort_by_length(state)


@compiled
def finish_step(requests, limits, state, now_us):
    """The committed step has ended: its first tokens have come, and who got a last one gives its pages back."""
    counts = state.counts
    for at in range(counts[NUM_BEGINNING]):
        state.first_token_us[state.beginning[at]] = now_us
    counts[NUM_BEGINNING] = 0
    if counts[NUM_LEAVING] == 0:
        return
    for at in range(counts[NUM_LEAVING]):
        request = state.leaving[at]
        state.phase[request] = FINISHED
        state.finish_us[request] = now_us
        if not hold(requests, limits, state, request):
            give_back(requests, limits, state, request)
        end(state.clients, request, now_us)
    counts[NUM_LEAVING] = 0
    running = 0
    for at in range(counts[NUM_RUNNING]):
        if state.phase[state.running[at]] != FINISHED:
            state.running[running] = state.running[at]
            running += 1
    counts[NUM_RUNNING] = running


@inner
def _sort_by_length(state):
    """Rows that gave more tokens than others moved up a few places."""
    for row in range(1, state.counts[NUM_DECODING]):
        request, at = state.decoding[row], row
        while at > 0 and state.cached[state.decoding[at - 1]] < state.cached[request]:
            state.decoding[at] = state.decoding[at - 1]
            at -= 1
        state.decoding[at] = request


@inner
def _insert_by_length(state, request):
    at = state.counts[NUM_DECODING]
    while at > 0 and state.cached[state.decoding[at - 1]] < state.cached[request]:
        state.decoding[at] = state.decoding[at - 1]
        at -= 1
    state.decoding[at] = request
    state.counts[NUM_DECODING] += 1


drop_stale("pkvsim")
