"""The compiled serving loop: the scheduler says what runs, the loop prices it and moves the clock. One pass a step,
every pass linear in the running requests."""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import drop_stale, inner
from pkvsim.memory.prefix_cache import EVICTABLE_PAGES, FREE_PAGES
from pkvsim.pricing.constants import compiled
from pkvsim.serving.attention import decode_us, prefill_us
from pkvsim.serving.scheduling import end_step, next_work_us, plan_step
from pkvsim.serving.state import (
    ATTENTION,
    BEST,
    DECODE_ROWS,
    DURATION,
    FIRST_ADMITTED,
    GAP_BINS,
    GAPS_PER_E,
    LOG_CAPACITY,
    LOG_FILL,
    LOG_STRIDE,
    LOG_USED,
    NEXT_SEND,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_RUNNING,
    NUM_WAITING,
    PAGES,
    PLANNED,
    PREFILL,
    PREFILL_TOKENS,
    REST,
    ROW_COUNT,
    START,
    STEPS,
    WAITING_COUNT,
)  # fmt: skip
from pkvsim.serving.tiers.gate import asks, next_ready_us


@compiled
def advance(requests, limits, attention, linear_us, host_us, state, log, max_steps, until_us, plan_until_us, alone):
    """Simulates up to max_steps more steps; True when nothing is left to run. Returns early where a request asks the
    pool (pkvsim.serving.tiers).

    Steps end until until_us and begin until plan_until_us; one that has begun is priced, and the clock says when it
    ends. alone: this server takes in what is sent; otherwise the caller does, and sets an idle server's clock.
    linear_us [step_tokens + 1] float64: the layers without attention, by the tokens of the step.
    """
    counts = state.counts
    for _ in range(max_steps):
        if log.counts[PLANNED]:
            if log.clock_us[0] > until_us:
                return False
            if alone and requests.concurrency:  # what was sent during the step found no slot that its end sets free
                next_work_us(state, log.clock_us[0])
            end_step(requests, limits, state, log.clock_us[0])
            log.counts[PLANNED] = 0
        # A call with the whole state costs as much as a small step's scheduling.
        if alone and (counts[NUM_RUNNING] == 0 or state.clients.times[NEXT_SEND] <= log.clock_us[0]):
            ready_us = next_work_us(state, log.clock_us[0])
            while ready_us > log.clock_us[0]:
                if ready_us == math.inf:
                    return True
                log.clock_us[0] = ready_us
                ready_us = next_work_us(state, ready_us)
        if counts[NUM_RUNNING] == 0 and counts[NUM_WAITING] == 0:
            return True
        if log.clock_us[0] > plan_until_us:
            return False
        plan_step(requests, limits, state, log.clock_us[0])
        if asks(state.gate):
            return False
        decode_rows = counts[NUM_DECODING]
        if decode_rows == 0 and counts[NUM_CHUNKS] == 0:
            ready_us = next_ready_us(state.gate, state.running, counts[NUM_RUNNING], log.clock_us[0])
            if ready_us < math.inf:  # all that run wait for their blocks
                log.clock_us[0] = min(ready_us, max(log.clock_us[0], state.clients.times[NEXT_SEND]))
                continue
        tokens, running_us = prefill_us(attention, state, np.int64(0), counts[FIRST_ADMITTED])
        more_tokens, admitted_us = prefill_us(attention, state, counts[FIRST_ADMITTED], counts[NUM_CHUNKS])
        tokens += more_tokens
        route, attention_us, best_us = decode_us(attention, state, log)
        decode_linear_us = linear_us[decode_rows]
        duration_us = attention_us + (running_us + admitted_us) + linear_us[decode_rows + tokens] + host_us
        entry = _log_entry(log)
        for column, value in (
            (DURATION, duration_us),
            (ROW_COUNT, float(counts[NUM_RUNNING])),
            (DECODE_ROWS, float(decode_rows)),
            (PREFILL_TOKENS, float(tokens)),
            (WAITING_COUNT, float(counts[NUM_WAITING])),
            (PAGES, float(limits.num_pages - state.pool.counts[FREE_PAGES] - state.pool.counts[EVICTABLE_PAGES])),
            (ATTENTION, attention_us),
            (REST, decode_linear_us + host_us),
            (PREFILL, running_us + admitted_us + linear_us[decode_rows + tokens] - decode_linear_us),
            (BEST, best_us),
        ):
            log.log[entry, column] += value
            log.totals[column] += value
        if route >= 0:
            log.log_routes[entry, route] += 1
            log.route_steps[route] += 1
        log.clock_us[0] += duration_us
        _count_gaps(state, log, duration_us, decode_rows)
        log.counts[PLANNED] = 1
        log.counts[STEPS] += 1
    return False


@inner
def _count_gaps(state, log, duration_us, decode_rows):
    """Counts the times since their requests' tokens before of the tokens that the step gives at the clock's time. A row
    that decodes did so, or ended its prompt, in the step before; a preempted one has waited since."""
    if decode_rows > 0:
        log.gaps[_gap_bin(duration_us)] += decode_rows
    for at in range(state.counts[NUM_CHUNKS]):
        request = state.chunk_request[at]
        if state.generated[request] and state.chunk_begin[at] + state.chunk_tokens[at] == state.target[request]:
            log.gaps[_gap_bin(log.clock_us[0] - state.paused_us[request])] += 1


@inner
def _gap_bin(us):
    return min(GAP_BINS - 1, int(math.log(max(us, 1.0)) * GAPS_PER_E))


@inner
def _log_entry(log):
    """The log entry that takes the coming step; a full log is folded to half its length first."""
    counts = log.counts
    if counts[LOG_USED] > 0 and counts[LOG_FILL] < counts[LOG_STRIDE]:
        counts[LOG_FILL] += 1
        return counts[LOG_USED] - 1
    if counts[LOG_USED] == LOG_CAPACITY:
        for at in range(LOG_CAPACITY):
            start = log.log[at, START]
            for table in (log.log, log.log_routes):
                for column in range(table.shape[1]):
                    value = table[at, column]
                    table[at, column] = 0
                    table[at // 2, column] += value
            if at % 2:
                log.log[at // 2, START] -= start
        counts[LOG_USED] = LOG_CAPACITY // 2
        counts[LOG_STRIDE] *= 2
    entry = counts[LOG_USED]
    log.log[entry, START] = log.clock_us[0]
    counts[LOG_USED] += 1
    counts[LOG_FILL] = 1
    return entry


drop_stale("pkvsim")
