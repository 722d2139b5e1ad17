"""The compiled serving loop: one pass a step, every pass linear in the running requests.

A step computes one token of every request past prefill and, with what is left of step_tokens, chunks of
prompts in order of arrival. Invariants that keep it incremental: running requests (`rows`) are in trace
order, and every waiting request arrived after all of them, because admission takes the earliest and
preemption the latest; `decoding` is sorted by length, which growing by one token a step preserves.
"""
from __future__ import annotations

import math
import sys

import numba
import numpy as np

from pkvsim import paper_rules, prefix_cache, pricing, schedule
from pkvsim.numba_cache import drop_stale
from pkvsim.paper_rules import FLASHINFER, paper_choice
from pkvsim.prefix_cache import EVICTABLE_PAGES, FREE_PAGES, acquire, allocate, free, release, resident_prefix
from pkvsim.pricing import price_route, price_routes
from pkvsim.serving_state import (
    ATTENTION, BEST, DECODE_ROWS, DECODING, DURATION, LOG_CAPACITY, LOG_FILL, LOG_STRIDE, LOG_USED, NEXT_ARRIVAL, PAGES,
    PAPER, PREEMPTED, PREFILL, PREFILL_TOKENS, REST, ROW_COUNT, ROWS, SERVED, START, STEP, WAITING, WAITING_AT,
)  # fmt: skip


@numba.njit(cache=True)
def advance(work, limits, attention, linear_us, host_us, state, max_steps):
    """Simulates up to max_steps more steps; True when no request is left.

    linear_us [step_tokens + 1] float64: the layers without attention, by the tokens of the step.
    """
    cursor = state.cursor
    for _ in range(max_steps):
        while not _arrive(work, state):
            if cursor[NEXT_ARRIVAL] == len(work.arrival_us):
                return True
            state.clock_us[0] = max(state.clock_us[0], work.arrival_us[cursor[NEXT_ARRIVAL]])
        preempted_before = cursor[PREEMPTED]
        _grow(work, limits, state)
        decode_rows = cursor[DECODING]
        budget = limits.step_tokens - decode_rows
        prefill_tokens, prefill_us = _prefill_running(attention, state, budget)
        if cursor[PREEMPTED] == preempted_before:
            more_tokens, more_us = _admit(work, limits, attention, state, budget - prefill_tokens)
            prefill_tokens += more_tokens
            prefill_us += more_us
        route, attention_us, best_us = _attend(attention, state)
        decode_linear_us = linear_us[decode_rows]
        entry = _log_entry(state)
        for column, value in (
            (DURATION, attention_us + prefill_us + linear_us[decode_rows + prefill_tokens] + host_us),
            (ROW_COUNT, float(cursor[ROWS])),
            (DECODE_ROWS, float(decode_rows)),
            (PREFILL_TOKENS, float(prefill_tokens)),
            (WAITING, float(cursor[NEXT_ARRIVAL] - cursor[WAITING_AT] + cursor[PREEMPTED])),
            (PAGES, float(limits.num_pages - state.pool.counts[FREE_PAGES] - state.pool.counts[EVICTABLE_PAGES])),
            (ATTENTION, attention_us),
            (REST, decode_linear_us + host_us),
            (PREFILL, prefill_us + linear_us[decode_rows + prefill_tokens] - decode_linear_us),
            (BEST, best_us),
        ):
            state.log[entry, column] += value
            state.totals[column] += value
        if route >= 0:
            state.route_steps[route] += 1
            state.log_routes[entry, route] += 1
        state.clock_us[0] += attention_us + prefill_us + linear_us[decode_rows + prefill_tokens] + host_us
        cursor[STEP] += 1
        _emit(work, limits, state)
    return False


@numba.njit(cache=True)
def _arrive(work, state):
    """Moves the arrival cursor to the clock; True when there is something to do now."""
    cursor = state.cursor
    while cursor[NEXT_ARRIVAL] < len(work.arrival_us) and work.arrival_us[cursor[NEXT_ARRIVAL]] <= state.clock_us[0]:
        cursor[NEXT_ARRIVAL] += 1
    while cursor[WAITING_AT] < cursor[NEXT_ARRIVAL] and work.rejected[cursor[WAITING_AT]] != SERVED:
        cursor[WAITING_AT] += 1
    return cursor[ROWS] > 0 or cursor[PREEMPTED] > 0 or cursor[WAITING_AT] < cursor[NEXT_ARRIVAL]


@numba.njit(cache=True)
def _private_pages(work, limits, request, tokens):
    """Pages beside the prompt's blocks that `tokens` cached tokens of a request need."""
    shared = 0
    if work.blocks.offsets[request] < work.blocks.offsets[request + 1]:
        shared = work.prompt[request]
    return (max(0, tokens - shared) + limits.page_size - 1) // limits.page_size


@numba.njit(cache=True)
def _grow(work, limits, state):
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


@numba.njit(cache=True)
def _preempt(work, limits, state, request):
    """Puts the latest running request back to the head of the queue; its pages go, its tokens stay."""
    cursor = state.cursor
    _give_back(work, limits, state, request)
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


@numba.njit(cache=True)
def _give_back(work, limits, state, request):
    free(state.pool, state.private_pages[request])
    state.private_pages[request] = 0
    release(state.pool, work.blocks, limits.cache_kind, request, state.cached[request])


@numba.njit(cache=True)
def _prefill_running(attention, state, budget):
    """Chunks of the running requests that are not past prefill: (tokens, us of their attention)."""
    tokens, us = 0, 0.0
    for at in range(state.cursor[ROWS]):
        request = state.rows[at]
        if state.target[request] > 0 and tokens < budget:
            chunk = min(budget - tokens, state.target[request] - state.cached[request])
            us += _prefill_attention_us(attention, state.cached[request], chunk)
            state.cached[request] += chunk
            tokens += chunk
    return tokens, us


@numba.njit(cache=True)
def _admit(work, limits, attention, state, budget):
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
        us += _prefill_attention_us(attention, hit_tokens, chunk)
        state.cached[request] = hit_tokens + chunk
        tokens += chunk
    return tokens, us


@numba.njit(cache=True)
def _prefill_attention_us(attention, begin, chunk):
    """Attention of tokens [begin, begin + chunk) of a prompt, causal, over all layers."""
    us = 0.0
    for kind in range(2):
        window = attention.window if kind else begin + chunk
        growing = max(0, min(chunk, window - begin))  # tokens that see all before them
        pairs = growing * begin + growing * (growing + 1) / 2 + (chunk - growing) * window
        read = min(begin, window) + chunk
        us += attention.layers[kind] * max(pairs * attention.prefill_us_per_pair, read * attention.prefill_us_per_token)
    return us


@numba.njit(cache=True)
def _attend(attention, state):
    """(route of the full layers or -1, us of all layers' decode attention, us had every choice been the cheapest)."""
    count = state.cursor[DECODING]
    if count == 0:
        return -1, 0.0, 0.0
    lens, clipped = state.lens[:count], state.clipped[:count]
    for at in range(count):
        lens[at] = state.cached[state.decoding[at]] + 1
    route = -1
    us, best_us = 0.0, 0.0
    if attention.layers[1] > 0:
        for at in range(count):
            clipped[at] = min(lens[at], attention.window)
        route, us, best_us = _route(attention, state, clipped, attention.layers[1])
    if attention.layers[0] > 0:
        route, full_us, full_best_us = _route(attention, state, lens, attention.layers[0])
        us += full_us
        best_us += full_best_us
    return route, us, best_us


@numba.njit(cache=True)
def _route(attention, state, lens, layers):
    """(route, us, us of the cheapest route) of `layers` layers that see lens [rows], longest first."""
    price_routes(
        lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
        attention.num_sms, attention.constants, state.prices_us, state.splits,
    )  # fmt: skip
    best_us = np.min(layers * state.prices_us + attention.plan_us)
    if attention.rule == PAPER:
        choice, splits = paper_choice(
            lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
            attention.num_sms, attention.paper,
        )  # fmt: skip
        route = attention.paper_routes[choice]
        us = state.prices_us[route] if choice == FLASHINFER else _pinned_us(attention, lens, route, splits)
        return route, layers * us + attention.plan_us[route], best_us
    taken, taken_us = -1, math.inf
    for route in range(len(state.prices_us)):
        if attention.allowed[route]:
            us = _pinned_us(attention, lens, route, attention.pinned) if attention.pinned else state.prices_us[route]
            us = layers * us + attention.plan_us[route]
            if us < taken_us:
                taken, taken_us = route, us
    return taken, taken_us, best_us


@numba.njit(cache=True)
def _pinned_us(attention, lens, route, splits):
    """Kernel us of one layer on a route whose rows take `splits` splits each."""
    return price_route(
        lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
        attention.num_sms, attention.constants[route], splits,
    )[0]  # fmt: skip


@numba.njit(cache=True)
def _emit(work, limits, state):
    """Ends a step at the clock: tokens come out, finished requests leave, those past prefill start decoding."""
    cursor, now = state.cursor, state.clock_us[0]
    running, finished = 0, 0
    for at in range(cursor[ROWS]):
        request = state.rows[at]
        prefilled = state.target[request] > 0
        if prefilled and state.cached[request] < state.target[request]:
            state.rows[running] = request
            running += 1
            continue
        state.target[request] = 0
        state.cached[request] += 0 if prefilled else 1
        state.generated[request] += 1
        if math.isnan(state.first_token_us[request]):
            state.first_token_us[request] = now
        if state.generated[request] == work.output[request]:
            state.finish_us[request] = now
            _give_back(work, limits, state, request)
            finished += 1
            continue
        state.rows[running] = request
        running += 1
        if prefilled:
            _insert_by_length(state, request)
    cursor[ROWS] = running
    if finished:
        kept = 0
        for at in range(cursor[DECODING]):
            if math.isnan(state.finish_us[state.decoding[at]]):
                state.decoding[kept] = state.decoding[at]
                kept += 1
        cursor[DECODING] = kept


@numba.njit(cache=True)
def _insert_by_length(state, request):
    at = state.cursor[DECODING]
    while at > 0 and state.cached[state.decoding[at - 1]] < state.cached[request]:
        state.decoding[at] = state.decoding[at - 1]
        at -= 1
    state.decoding[at] = request
    state.cursor[DECODING] += 1


@numba.njit(cache=True)
def _log_entry(state):
    """The log entry that takes the coming step; a full log is folded to half its length first."""
    cursor = state.cursor
    if cursor[LOG_USED] > 0 and cursor[LOG_FILL] < cursor[LOG_STRIDE]:
        cursor[LOG_FILL] += 1
        return cursor[LOG_USED] - 1
    if cursor[LOG_USED] == LOG_CAPACITY:
        for at in range(LOG_CAPACITY // 2):
            start = state.log[2 * at, START]
            state.log[at] = state.log[2 * at] + state.log[2 * at + 1]
            state.log[at, START] = start
            state.log_routes[at] = state.log_routes[2 * at] + state.log_routes[2 * at + 1]
        state.log[LOG_CAPACITY // 2 :] = 0
        state.log_routes[LOG_CAPACITY // 2 :] = 0
        cursor[LOG_USED] = LOG_CAPACITY // 2
        cursor[LOG_STRIDE] *= 2
    entry = cursor[LOG_USED]
    state.log[entry, START] = state.clock_us[0]
    cursor[LOG_USED] += 1
    cursor[LOG_FILL] = 1
    return entry


drop_stale(advance, paper_rules, prefix_cache, pricing, schedule, sys.modules[__name__])
