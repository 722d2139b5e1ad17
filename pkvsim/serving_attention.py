"""Attention in the serving loop: which route decode takes and what it costs, and what prefill costs. Compiled."""
from __future__ import annotations

import math

from pkvsim.paper_rules import FLASHINFER, paper_choice
from pkvsim.pricing import price_route, price_routes
from pkvsim.pricing_tasks import inner
from pkvsim.serving_state import DECODE_STEPS, DECODING, PAPER, SAMPLE_STRIDE, SAMPLES, SAMPLES_USED


@inner
def prefill_attention_us(attention, begin, chunk):
    """Attention of tokens [begin, begin + chunk) of a prompt, causal, over all layers."""
    us = 0.0
    for kind in range(2):
        window = attention.window if kind else begin + chunk
        growing = max(0, min(chunk, window - begin))  # tokens that see all before them
        pairs = growing * begin + growing * (growing + 1) / 2 + (chunk - growing) * window
        read = min(begin, window) + chunk
        us += attention.layers[kind] * max(pairs * attention.prefill_us_per_pair, read * attention.prefill_us_per_token)
    return us


@inner
def attend(attention, state):
    """(route of the full layers or -1, us of all layers' decode attention, us had every choice been the cheapest)."""
    count = state.cursor[DECODING]
    if count == 0:
        return -1, 0.0, 0.0
    lens, clipped = state.lens[:count], state.clipped[:count]
    for at in range(count):
        lens[at] = state.cached[state.decoding[at]] + 1
    route, splits = -1, 0
    us, best_us = 0.0, 0.0
    if attention.layers[1] > 0:
        for at in range(count):
            clipped[at] = min(lens[at], attention.window)
        route, us, best_us, splits = _route(attention, state, clipped, attention.layers[1])
    if attention.layers[0] > 0:
        route, full_us, full_best_us, splits = _route(attention, state, lens, attention.layers[0])
        us += full_us
        best_us += full_best_us
    _sample(state, lens, route, splits)
    return route, us, best_us


@inner
def _route(attention, state, lens, layers):
    """(route, us, us of the cheapest route, splits of every row or 0) of `layers` layers that see lens [rows]."""
    price_routes(
        lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
        attention.num_sms, attention.constants, state.prices_us, state.splits,
    )  # fmt: skip
    best_us = math.inf
    for route in range(len(state.prices_us)):
        best_us = min(best_us, layers * state.prices_us[route] + attention.plan_us[route])
    if attention.rule == PAPER:
        choice, splits = paper_choice(
            lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
            attention.num_sms, attention.paper,
        )  # fmt: skip
        route = attention.paper_routes[choice]
        us = state.prices_us[route] if choice == FLASHINFER else _pinned_us(attention, lens, route, splits)
        return route, layers * us + attention.plan_us[route], best_us, 0 if choice == FLASHINFER else splits
    taken, taken_us = -1, math.inf
    for route in range(len(state.prices_us)):
        if attention.allowed[route]:
            us = _pinned_us(attention, lens, route, attention.pinned) if attention.pinned else state.prices_us[route]
            us = layers * us + attention.plan_us[route]
            if us < taken_us:
                taken, taken_us = route, us
    return taken, taken_us, best_us, attention.pinned


@inner
def _pinned_us(attention, lens, route, splits):
    """Kernel us of one layer on a route whose rows take `splits` splits each."""
    return price_route(
        lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
        attention.num_sms, attention.constants[route], splits,
    )[0]  # fmt: skip


@inner
def _sample(state, lens, route, splits):
    """Keeps every SAMPLE_STRIDE-th decode step's lengths and route; a full sample is thinned to half."""
    cursor = state.cursor
    cursor[DECODE_STEPS] += 1
    if (cursor[DECODE_STEPS] - 1) % cursor[SAMPLE_STRIDE]:
        return
    if cursor[SAMPLES_USED] == SAMPLES:
        for at in range(SAMPLES // 2):
            for column in range(state.sample_choice.shape[1]):
                state.sample_choice[at, column] = state.sample_choice[2 * at, column]
            for row in range(state.sample_choice[at, 0]):
                state.sample_lens[at, row] = state.sample_lens[2 * at, row]
        cursor[SAMPLES_USED] = SAMPLES // 2
        cursor[SAMPLE_STRIDE] *= 2
    at = cursor[SAMPLES_USED]
    for row in range(len(lens)):
        state.sample_lens[at, row] = lens[row]
    state.sample_choice[at, 0] = len(lens)
    state.sample_choice[at, 1] = route
    state.sample_choice[at, 2] = splits
    cursor[SAMPLES_USED] += 1
