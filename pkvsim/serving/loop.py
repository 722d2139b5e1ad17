"""The compiled serving loop: one pass a step, every pass linear in the running requests.

A step computes one token of every request past prefill and, with what is left of step_tokens, chunks of prompts in
order of arrival. `decoding` stays sorted by length without sorting, because all its rows grow by one token a step.
"""
from __future__ import annotations

import math


from pkvsim.compiled import drop_stale, inner, outer
from pkvsim.memory.prefix_cache import EVICTABLE_PAGES, FREE_PAGES
from pkvsim.serving.attention import attend
from pkvsim.serving.scheduler import admit, give_back, grow, prefill_running
from pkvsim.serving.state import (
    ATTENTION,
    BEST,
    DECODE_ROWS,
    DECODING,
    DURATION,
    LOG_CAPACITY,
    LOG_FILL,
    LOG_STRIDE,
    LOG_USED,
    NEXT_ARRIVAL,
    PAGES,
    POOL_FULL,
    PREEMPTED,
    PREFILL,
    PREFILL_TOKENS,
    REST,
    ROW_COUNT,
    ROWS,
    SERVED,
    START,
    STEP,
    WAITING,
    WAITING_AT,
)  # fmt: skip


@outer
def advance(work, limits, attention, linear_us, host_us, state, max_steps):
    """Simulates up to max_steps more steps; True when no request is left.

    linear_us [step_tokens + 1] float64: the layers without attention, by the tokens of the step.
    """
    cursor = state.cursor
    for _ in range(max_steps):
        while _may_arrive(work, cursor, state.clock_us[0]) and not _arrive(work, state):
            if cursor[NEXT_ARRIVAL] == len(work.arrival_us):
                return True
            state.clock_us[0] = max(state.clock_us[0], work.arrival_us[cursor[NEXT_ARRIVAL]])
        preempted_before = cursor[PREEMPTED]
        grow(work, limits, state)
        decode_rows = cursor[DECODING]
        budget = limits.step_tokens - decode_rows
        prefill_tokens, prefill_us = 0, 0.0
        if decode_rows < cursor[ROWS]:
            prefill_tokens, prefill_us = prefill_running(attention, state, budget)
        if cursor[PREEMPTED] == preempted_before and not cursor[POOL_FULL]:
            more_tokens, more_us = admit(work, limits, attention, state, budget - prefill_tokens)
            prefill_tokens += more_tokens
            prefill_us += more_us
        route, attention_us, best_us = attend(attention, state)
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


@inner
def _may_arrive(work, cursor, now):
    """Whether the arrival cursor has to be looked at: most steps are decided here."""
    at = cursor[NEXT_ARRIVAL]
    return cursor[ROWS] == 0 or (at < len(work.arrival_us) and work.arrival_us[at] <= now)


@inner
def _arrive(work, state):
    """Moves the arrival cursor to the clock; True when there is something to do now."""
    cursor = state.cursor
    while cursor[NEXT_ARRIVAL] < len(work.arrival_us) and work.arrival_us[cursor[NEXT_ARRIVAL]] <= state.clock_us[0]:
        cursor[NEXT_ARRIVAL] += 1
    while cursor[WAITING_AT] < cursor[NEXT_ARRIVAL] and work.rejected[cursor[WAITING_AT]] != SERVED:
        cursor[WAITING_AT] += 1
    return cursor[ROWS] > 0 or cursor[PREEMPTED] > 0 or cursor[WAITING_AT] < cursor[NEXT_ARRIVAL]


@inner
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
            give_back(work, limits, state, request)
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


@inner
def _insert_by_length(state, request):
    at = state.cursor[DECODING]
    while at > 0 and state.cached[state.decoding[at - 1]] < state.cached[request]:
        state.decoding[at] = state.decoding[at - 1]
        at -= 1
    state.decoding[at] = request
    state.cursor[DECODING] += 1


@inner
def _log_entry(state):
    """The log entry that takes the coming step; a full log is folded to half its length first."""
    cursor = state.cursor
    if cursor[LOG_USED] > 0 and cursor[LOG_FILL] < cursor[LOG_STRIDE]:
        cursor[LOG_FILL] += 1
        return cursor[LOG_USED] - 1
    if cursor[LOG_USED] == LOG_CAPACITY:
        for at in range(LOG_CAPACITY):
            start = state.log[at, START]
            for table in (state.log, state.log_routes):
                for column in range(table.shape[1]):
                    value = table[at, column]
                    table[at, column] = 0
                    table[at // 2, column] += value
            if at % 2:
                state.log[at // 2, START] -= start
        cursor[LOG_USED] = LOG_CAPACITY // 2
        cursor[LOG_STRIDE] *= 2
    entry = cursor[LOG_USED]
    state.log[entry, START] = state.clock_us[0]
    cursor[LOG_USED] += 1
    cursor[LOG_FILL] = 1
    return entry

drop_stale("pkvsim")
