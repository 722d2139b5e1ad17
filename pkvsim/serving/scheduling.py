"""Who runs in a step, who waits, who gives way. Compiled; pkvsim.serving.scheduler is the way in from Python.

A step computes one token of every request past prefill and, with what is left of step_tokens, chunks of prompts in
order of arrival. Admission takes the earliest waiting request and preemption the latest running one, so all that wait
arrived after all that run: `running` is in trace order, and so is the stack of the preempted with the earliest on top.
`decoding` stays sorted by length without sorting, because all its rows grow by one token a step.
"""
from __future__ import annotations

import math

from pkvsim.compiled import drop_stale, inner
from pkvsim.memory.prefix_cache import acquire, allocate, free, release, resident_prefix
from pkvsim.pricing.constants import compiled
from pkvsim.serving.state import (
    DECODING,
    FINISHED,
    FIRST_ADMITTED,
    JUST_PREEMPTED,
    NEXT_ARRIVAL,
    NEXT_WAITING,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_PREEMPTED,
    NUM_RUNNING,
    POOL_FULL,
    PREEMPTED,
    PREFILLING,
    SERVED,
)


@compiled
def next_work_us(requests, state, now_us):
    """now_us where a request runs or waits, else when the next one arrives that is served, infinity after the last."""
    counts, at = state.counts, state.counts[NEXT_ARRIVAL]
    end = len(requests.arrival_us)
    if counts[NUM_RUNNING] > 0 and (at == end or requests.arrival_us[at] > now_us):
        return now_us
    while at < end and requests.arrival_us[at] <= now_us:
        at += 1
    counts[NEXT_ARRIVAL] = at
    _skip_rejected(requests, counts)
    if counts[NUM_RUNNING] > 0 or counts[NUM_PREEMPTED] > 0 or counts[NEXT_WAITING] < at:
        return now_us
    while at < end and requests.rejected[at] != SERVED:
        at += 1
    return requests.arrival_us[at] if at < end else math.inf


@inner
def _skip_rejected(requests, counts):
    while counts[NEXT_WAITING] < counts[NEXT_ARRIVAL] and requests.rejected[counts[NEXT_WAITING]] != SERVED:
        counts[NEXT_WAITING] += 1


@compiled
def plan_step(requests, limits, state, now_us):
    """Makes a step of those that decode, of further chunks of those in prefill, and of whom there is room to admit."""
    counts = state.counts
    counts[NUM_CHUNKS] = counts[JUST_PREEMPTED] = 0
    _grow(requests, limits, state)
    budget = limits.step_tokens - counts[NUM_DECODING]
    if counts[NUM_DECODING] < counts[NUM_RUNNING]:
        budget -= _continue_prefills(state, budget)
    counts[FIRST_ADMITTED] = counts[NUM_CHUNKS]
    if counts[JUST_PREEMPTED] == 0 and counts[POOL_FULL] == 0:
        _admit(requests, limits, state, budget, now_us)


@inner
def _private_pages(requests, limits, request, tokens):
    """Pages beside the prompt's blocks that `tokens` cached tokens of a request need."""
    shared = 0
    if requests.blocks.offsets[request] < requests.blocks.offsets[request + 1]:
        shared = requests.prompt[request]
    return (max(0, tokens - shared) + limits.page_size - 1) // limits.page_size


@inner
def _grow(requests, limits, state):
    """Gives every decoding request the page of its next token, at the cost of the latest when none is free."""
    counts = state.counts
    at = 0
    while at < counts[NUM_RUNNING]:
        request = state.running[at]
        if state.phase[request] == DECODING:
            need = _private_pages(requests, limits, request, state.cached[request] + 1) - state.private_pages[request]
            while need > 0:
                if allocate(state.pool, requests.blocks, need):
                    state.private_pages[request] += need
                    break
                latest = state.running[counts[NUM_RUNNING] - 1]
                _preempt(requests, limits, state, latest)
                if latest == request:
                    break
        at += 1


@inner
def _preempt(requests, limits, state, request):
    """Puts the latest running request back to the head of the queue; its pages go, its tokens stay."""
    counts = state.counts
    _give_back(requests, limits, state, request)
    counts[NUM_RUNNING] -= 1
    if state.phase[request] == DECODING:
        at = 0
        while state.decoding[at] != request:
            at += 1
        counts[NUM_DECODING] -= 1
        for place in range(at, counts[NUM_DECODING]):
            state.decoding[place] = state.decoding[place + 1]
    state.phase[request] = PREEMPTED
    state.cached[request] = 0
    state.preemptions[request] += 1
    state.preempted[counts[NUM_PREEMPTED]] = request
    counts[NUM_PREEMPTED] += 1
    counts[JUST_PREEMPTED] += 1


@inner
def _give_back(requests, limits, state, request):
    """A request's pages."""
    state.counts[POOL_FULL] = 0
    free(state.pool, state.private_pages[request])
    state.private_pages[request] = 0
    release(state.pool, requests.blocks, limits.cache_kind, request, state.cached[request])


@inner
def _add_chunk(state, request, begin, tokens):
    at = state.counts[NUM_CHUNKS]
    state.chunk_request[at] = request
    state.chunk_begin[at] = begin
    state.chunk_tokens[at] = tokens
    state.counts[NUM_CHUNKS] += 1


@inner
def _continue_prefills(state, budget):
    """Chunks of the running requests that are not past prefill; their tokens."""
    tokens = 0
    for at in range(state.counts[NUM_RUNNING]):
        request = state.running[at]
        if state.phase[request] == PREFILLING and tokens < budget:
            chunk = min(budget - tokens, state.target[request] - state.cached[request])
            _add_chunk(state, request, state.cached[request], chunk)
            tokens += chunk
    return tokens


@inner
def _admit(requests, limits, state, budget, now_us):
    """Admits in order of arrival while tokens, rows and pages last."""
    counts = state.counts
    tokens = 0
    while tokens < budget and counts[NUM_RUNNING] < len(state.running):
        again = counts[NUM_PREEMPTED] > 0
        if again:
            request = state.preempted[counts[NUM_PREEMPTED] - 1]
        else:
            _skip_rejected(requests, counts)
            if counts[NEXT_WAITING] == counts[NEXT_ARRIVAL]:
                break
            request = counts[NEXT_WAITING]
        target = requests.prompt[request] + state.generated[request]
        private = _private_pages(requests, limits, request, target)
        hit_blocks, hit_tokens = resident_prefix(state.pool, requests.blocks, request)
        keep_free = limits.keep_free if counts[NUM_RUNNING] > 0 else 0
        if not acquire(state.pool, requests.blocks, limits.cache_kind, request, private, keep_free):
            counts[POOL_FULL] = 1  # until somebody gives pages back
            break
        hit_tokens = min(hit_tokens, target - 1)
        if again:
            counts[NUM_PREEMPTED] -= 1
        else:
            counts[NEXT_WAITING] += 1
            state.start_us[request] = now_us
            state.hit_blocks[request] = hit_blocks
            state.hit_tokens[request] = hit_tokens
        state.running[counts[NUM_RUNNING]] = request
        counts[NUM_RUNNING] += 1
        state.phase[request] = PREFILLING
        state.target[request] = target
        state.private_pages[request] = private
        state.cached[request] = hit_tokens
        chunk = min(budget - tokens, target - hit_tokens)
        _add_chunk(state, request, hit_tokens, chunk)
        tokens += chunk


@compiled
def end_step(requests, limits, state, now_us):
    """Ends the planned step: tokens come out, finished requests leave, those past prefill start decoding."""
    counts = state.counts
    for at in range(counts[NUM_CHUNKS]):
        state.cached[state.chunk_request[at]] += state.chunk_tokens[at]
    counts[NUM_CHUNKS] = 0
    running, finished = 0, 0
    for at in range(counts[NUM_RUNNING]):
        request = state.running[at]
        prefilled = state.phase[request] == PREFILLING
        if prefilled and state.cached[request] < state.target[request]:
            state.running[running] = request
            running += 1
            continue
        state.phase[request] = DECODING
        state.cached[request] += 0 if prefilled else 1
        state.generated[request] += 1
        if math.isnan(state.first_token_us[request]):
            state.first_token_us[request] = now_us
        if state.generated[request] == requests.output[request]:
            state.phase[request] = FINISHED
            state.finish_us[request] = now_us
            _give_back(requests, limits, state, request)
            finished += 1
            continue
        state.running[running] = request
        running += 1
        if prefilled:
            _insert_by_length(state, request)
    counts[NUM_RUNNING] = running
    if finished:
        kept = 0
        for at in range(counts[NUM_DECODING]):
            if state.phase[state.decoding[at]] == DECODING:
                state.decoding[kept] = state.decoding[at]
                kept += 1
        counts[NUM_DECODING] = kept


@inner
def _insert_by_length(state, request):
    at = state.counts[NUM_DECODING]
    while at > 0 and state.cached[state.decoding[at - 1]] < state.cached[request]:
        state.decoding[at] = state.decoding[at - 1]
        at -= 1
    state.decoding[at] = request
    state.counts[NUM_DECODING] += 1


drop_stale("pkvsim")
