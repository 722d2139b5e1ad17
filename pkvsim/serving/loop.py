"""The compiled serving loop: the scheduler says what runs, the loop prices it and moves the clock. One pass a step,
every pass linear in the running requests."""
from __future__ import annotations

import math

from pkvsim.compiled import drop_stale, inner, merged, unlocked
from pkvsim.memory.prefix_cache import EVICTABLE_PAGES, FREE_PAGES
from pkvsim.outside.step_costs import DECODE_ATTENTION, DRAFTS, HOST, heated, rest_us, step_parts
from pkvsim.serving.attention import decode_us, fill_lens
from pkvsim.serving.queueing.clients import next_send_us
from pkvsim.serving.scheduling import commit_step, finish_step, next_work_us, plan_step
from pkvsim.serving.shared.grouping import NUM_ROWS, are_grouped, group_rows
from pkvsim.serving.state import (
    ATTENTION,
    BEST,
    BUSY_UNTIL,
    CLOCK,
    DECODE_ROWS,
    DECODE_STEPS,
    DELIVERED,
    DURATION,
    FOLLOWING,
    GAP_BINS,
    GAPS_PER_E,
    HEAT,
    LOG_CAPACITY,
    LOG_FILL,
    LOG_STRIDE,
    LOG_USED,
    NEXT_SEND,
    NUM_BEGINNING,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_LEAVING,
    NUM_RUNNING,
    NUM_WAITING,
    PAGES,
    PLANNED,
    PREFILL,
    PREFILL_TOKENS,
    REST,
    ROW_COUNT,
    ROWS_WAIT,
    START,
    STEPS,
    WAITING_COUNT,
)  # fmt: skip
from pkvsim.serving.tier_gate import asks, next_ready_us


@unlocked
def advance(
    requests, limits, attention, costs, steps_in_flight, state, log, max_steps, until_us, plan_until_us, alone
):
    """Simulates up to max_steps more steps; True when nothing is left to run. Returns early where a request asks the
    pool (pkvsim.serving.tiers).

    Steps end until until_us and begin until plan_until_us; one that has begun is priced, and the clock says when it
    ends. With 2 steps in flight the one after it is planned as it begins, or as soon as there is anything to plan.
    alone: this server takes in what is sent; otherwise the caller does, and sets an idle server's clock.
    """
    counts, clock = state.counts, log.clock_us
    for _ in range(max_steps):
        if log.counts[PLANNED]:
            if steps_in_flight == 2 and not log.counts[FOLLOWING]:
                _plan_late(requests, limits, state, log, plan_until_us, alone)
                if asks(state.gate):
                    return False
            if clock[CLOCK] > until_us:
                return False
            if alone and requests.concurrency:  # what was sent during the step found no slot that its end sets free
                next_work_us(state, clock[CLOCK])
            # A call with the whole state costs as much as a small step's scheduling.
            if counts[NUM_BEGINNING] or counts[NUM_LEAVING]:
                finish_step(requests, limits, state, clock[DELIVERED])
            log.counts[PLANNED] = 0
        if alone and (counts[NUM_RUNNING] == 0 or state.clients.times[NEXT_SEND] <= clock[CLOCK]):
            ready_us = next_work_us(state, clock[CLOCK])
            while ready_us > clock[CLOCK]:
                if ready_us == math.inf:
                    return True
                clock[CLOCK] = ready_us
                ready_us = next_work_us(state, ready_us)
        if not log.counts[FOLLOWING] and counts[NUM_RUNNING] == 0 and counts[NUM_WAITING] == 0:
            return True
        if clock[CLOCK] > plan_until_us:
            return False
        if not log.counts[FOLLOWING]:
            planned = plan_step(requests, limits, state, clock[CLOCK])
            if asks(state.gate):
                return False
            if not planned:
                ready_us = next_ready_us(state.gate, state.running, counts[NUM_RUNNING], clock[CLOCK])
                if ready_us < math.inf:  # all that run wait for their blocks
                    clock[CLOCK] = min(ready_us, max(clock[CLOCK], state.clients.times[NEXT_SEND]))
                continue
        start_us = clock[CLOCK]
        _run_step(requests, limits, attention, costs, state, log)
        commit_step(requests.output, limits, state)
        if steps_in_flight == 2:
            log.counts[FOLLOWING] = plan_step(requests, limits, state, start_us)
            if asks(state.gate):
                return False
    return False


@inner
def _plan_late(requests, limits, state, log, plan_until_us, alone):
    """Nothing was there to plan as the running step began: what comes before it ends is planned as it comes."""
    if not alone:
        if state.counts[NUM_WAITING] > 0:
            log.counts[FOLLOWING] = plan_step(requests, limits, state, min(plan_until_us, log.clock_us[CLOCK]))
        return
    at_us = next_send_us(state.clients)
    while at_us < log.clock_us[CLOCK] and not log.counts[FOLLOWING] and not asks(state.gate):
        next_work_us(state, at_us)
        if state.counts[NUM_WAITING] > 0:
            log.counts[FOLLOWING] = plan_step(requests, limits, state, at_us)
        at_us = state.clients.times[NEXT_SEND]


@merged
def _run_step(requests, limits, attention, costs, state, log):
    """Prices and logs the planned step, which begins at the clock's time, and sets the clock to its end."""
    counts, clock = state.counts, log.clock_us
    rows, chunks = 0 if counts[ROWS_WAIT] else counts[NUM_DECODING], counts[NUM_CHUNKS]
    tokens = 0
    for at in range(chunks):
        tokens += state.chunk_tokens[at]
    woken = clock[CLOCK] > clock[BUSY_UNTIL]
    if woken:
        clock[HEAT] = 0.0
    warm = clock[HEAT] / costs.boost_us if costs.boost_us > 0 else 1.0
    fill_lens(state, log, rows, limits.query_tokens)
    if attention.sharing.any and not are_grouped(
        state.decoding[:rows], log.grouping.counts[NUM_ROWS], log.grouping.requests
    ):
        group_rows(
            state.decoding[:rows], requests.block_places, requests.blocks.ids, requests.block_tokens,
            attention.sharing.tokens_per_member, attention.sharing.least_tokens, log.grouping,
        )  # fmt: skip
    route, routed_us, best_us = decode_us(attention, log, rows)
    duration_us = step_parts(
        costs, log.lens[:rows], state.chunk_begin[:chunks], state.chunk_tokens[:chunks],
        rows * limits.query_tokens + chunks, routed_us, warm, log.parts,
    )  # fmt: skip
    log.parts[DRAFTS] = 0.0
    if limits.query_tokens > 1 and rows > 0:
        plain_us = log.parts[DECODE_ATTENTION] + rest_us(costs, rows, rows, warm)
        log.parts[DRAFTS] = (limits.query_tokens - 1) * limits.draft_cost * plain_us
        duration_us += log.parts[DRAFTS]
    if woken:
        log.part_totals[HOST] += (costs.wake_factor - 1) * duration_us
        duration_us *= costs.wake_factor
    for part in range(len(log.parts)):
        log.part_totals[part] += log.parts[part]
    clock[HEAT] = heated(costs, clock[HEAT], rows * limits.query_tokens + tokens, duration_us)
    attention_us = log.parts[DECODE_ATTENTION]
    decode_rest_us = duration_us - attention_us
    if chunks > 0:
        decode_rest_us = 0.0 if rows == 0 else min(
            decode_rest_us, log.parts[DRAFTS] + rest_us(costs, rows, rows * limits.query_tokens, warm)
        )  # fmt: skip
    entry = _log_entry(log)
    for column, value in (
        (DURATION, duration_us),
        (ROW_COUNT, float(counts[NUM_RUNNING])),
        (DECODE_ROWS, float(rows)),
        (PREFILL_TOKENS, float(tokens)),
        (WAITING_COUNT, float(counts[NUM_WAITING])),
        (PAGES, float(limits.num_pages - state.pool.counts[FREE_PAGES] - state.pool.counts[EVICTABLE_PAGES])),
        (ATTENTION, attention_us),
        (REST, decode_rest_us),
        (PREFILL, duration_us - attention_us - decode_rest_us),
        (BEST, attention_us - routed_us + best_us),
    ):
        log.log[entry, column] += value
        log.totals[column] += value
    if route >= 0:
        log.log_routes[entry, route] += 1
        log.route_steps[route] += 1
    late_us = max(0.0, clock[DELIVERED] - clock[CLOCK])
    clock[CLOCK] += duration_us
    clock[BUSY_UNTIL] = clock[DELIVERED] = clock[CLOCK]
    if costs.token_us > 0:
        _deliver(costs, state, clock, late_us - duration_us, rows)
        late_us -= clock[DELIVERED] - clock[CLOCK]
    _count_gaps(limits, state, log, duration_us - late_us, rows)
    log.counts[PLANNED] = 1
    log.counts[FOLLOWING] = 0
    log.counts[DECODE_STEPS] += rows > 0
    log.counts[STEPS] += 1


@inner
def _deliver(costs, state, clock, late_us, decode_rows):
    """Hands the tokens of a step that ended at the clock's time to their clients, through one process that was busy for
    late_us longer."""
    us = costs.token_us * decode_rows
    for at in range(decode_rows):
        us += costs.token_place_us * state.generated[state.decoding[at]]
    for at in range(state.counts[NUM_CHUNKS]):
        if state.chunk_begin[at] + state.chunk_tokens[at] == state.target[state.chunk_request[at]]:
            us += costs.token_us
    clock[DELIVERED] += max(0.0, late_us) + us


@merged
def _count_gaps(limits, state, log, duration_us, decode_rows):
    """Counts the times since their requests' tokens before of the tokens that the step gives at the clock's time. A row
    that decodes did so, or ended its prompt, in the step before, unless it waited for prompts; a preempted one has
    waited since."""
    now_us = log.clock_us[CLOCK]
    if limits.mixes:
        if decode_rows > 0:
            log.gaps[_gap_bin(duration_us)] += decode_rows
    else:
        for at in range(decode_rows):
            request = state.decoding[at]
            log.gaps[_gap_bin(now_us - state.paused_us[request])] += 1
            state.paused_us[request] = now_us
    for at in range(state.counts[NUM_CHUNKS]):
        request = state.chunk_request[at]
        if state.chunk_begin[at] + state.chunk_tokens[at] == state.target[request]:
            if state.generated[request]:
                log.gaps[_gap_bin(now_us - state.paused_us[request])] += 1
            if not limits.mixes:
                state.paused_us[request] = now_us


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
    log.log[entry, START] = log.clock_us[CLOCK]
    counts[LOG_USED] += 1
    counts[LOG_FILL] = 1
    return entry


drop_stale("pkvsim")
