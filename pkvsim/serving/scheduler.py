"""The scheduler of the serving loop: who runs, who waits, who gives way. Compiled.

Admission takes the earliest waiting request and preemption the latest running one, so all that wait arrived after all
that run: `rows` is in trace order, and so is the stack of the preempted with the earliest on top.
"""
from __future__ import annotations

from pkvsim.compiled import inner
from pkvsim.memory.prefix_cache import acquire, allocate, free, release, resident_prefix
from pkvsim.serving.attention import prefill_attention_us
from pkvsim.serving.state import DECODING, NEXT_ARRIVAL, POOL_FULL, PREEMPTED, ROWS, SERVED, WAITING_AT


@inner
def _private_pages(work, limits, request, tokens):
    """Pages beside the prompt's blocks that `tokens` cached tokens of a request need."""
    shared = 0
    if work.blocks.offsets[request] < work.blocks.offsets[request + 1]:
        shared = work.prompt[request]
    return (max(0, tokens - shared) + limits.page_size - 1) // limits.page_size


@inner
def grow(work, limits, state):
    """Gives every decoding request the page of its next token, at the cost of the latest when none is free."""
    cursor = state.cursor
    at = 0
    while at < cursor[ROWS]:
        request = state.rows[at]
        if state.target[request] == 0:
            need = _private_pages(work, limits, request, state.cached[request] + 1) - state.private_pages[request]
            while need > 0:
                if allocate(state.pool, work.blocks, need):
                    state.private_pages[request] += need
                    break
                latest = state.rows[cursor[ROWS] - 1]
                _preempt(work, limits, state, latest)
                if latest == request:
                    break
        at += 1


@inner
def _preempt(work, limits, state, request):
    """Puts the latest running request back to the head of the queue; its pages go, its tokens stay."""
    cursor = state.cursor
    give_back(work, limits, state, request)
    cursor[ROWS] -= 1
    if state.target[request] == 0:
        at = 0
        while state.decoding[at] != request:
            at += 1
        cursor[DECODING] -= 1
        for place in range(at, cursor[DECODING]):
            state.decoding[place] = state.decoding[place + 1]
    state.cached[request] = 0
    state.preemptions[request] += 1
    state.preempted[cursor[PREEMPTED]] = request
    cursor[PREEMPTED] += 1


@inner
def give_back(work, limits, state, request):
    state.cursor[POOL_FULL] = 0
    free(state.pool, state.private_pages[request])
    state.private_pages[request] = 0
    release(state.pool, work.blocks, limits.cache_kind, request, state.cached[request])


@inner
def prefill_running(attention, state, budget):
    """Chunks of the running requests that are not past prefill: (tokens, us of their attention)."""
    tokens, us = 0, 0.0
    for at in range(state.cursor[ROWS]):
        request = state.rows[at]
        if state.target[request] > 0 and tokens < budget:
            chunk = min(budget - tokens, state.target[request] - state.cached[request])
            us += prefill_attention_us(attention, state.cached[request], chunk)
            state.cached[request] += chunk
            tokens += chunk
    return tokens, us


@inner
def admit(work, limits, attention, state, budget):
    """Admits in order of arrival while tokens, rows and pages last: (tokens, us of their attention)."""
    cursor = state.cursor
    tokens, us = 0, 0.0
    while tokens < budget and cursor[ROWS] < len(state.rows):
        again = cursor[PREEMPTED] > 0
        if again:
            request = state.preempted[cursor[PREEMPTED] - 1]
        else:
            while cursor[WAITING_AT] < cursor[NEXT_ARRIVAL] and work.rejected[cursor[WAITING_AT]] != SERVED:
                cursor[WAITING_AT] += 1
            if cursor[WAITING_AT] == cursor[NEXT_ARRIVAL]:
                break
            request = cursor[WAITING_AT]
        target = work.prompt[request] + state.generated[request]
        private = _private_pages(work, limits, request, target)
        hit_blocks, hit_tokens = resident_prefix(state.pool, work.blocks, request)
        keep_free = limits.keep_free if cursor[ROWS] > 0 else 0
        if not acquire(state.pool, work.blocks, limits.cache_kind, request, private, keep_free):
            cursor[POOL_FULL] = 1  # until somebody gives pages back
            break
        hit_tokens = min(hit_tokens, target - 1)
        if again:
            cursor[PREEMPTED] -= 1
        else:
            cursor[WAITING_AT] += 1
            state.start_us[request] = state.clock_us[0]
            state.hit_blocks[request] = hit_blocks
            state.hit_tokens[request] = hit_tokens
        state.rows[cursor[ROWS]] = request
        cursor[ROWS] += 1
        state.target[request] = target
        state.private_pages[request] = private
        chunk = min(budget - tokens, target - hit_tokens)
        us += prefill_attention_us(attention, hit_tokens, chunk)
        state.cached[request] = hit_tokens + chunk
        tokens += chunk
    return tokens, us
