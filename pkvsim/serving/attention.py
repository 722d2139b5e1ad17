"""Attention in the serving loop: which route decode takes and what it costs, and what prefill costs. Compiled.

A decode step's layers cost what CalibratedPolicy.decide(layers=) says of them, by the wall clock: planning, the first
layer alone, and for every further one its kernel or the host's time to issue it, whichever is longer. The rest of the
layer, which would hide some of that time, does not: see ServingConfig.graphs for a server that issues nothing.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner
from pkvsim.policy.paper_rules import FLASHINFER, paper_choice
from pkvsim.pricing.constants import BANDWIDTH
from pkvsim.pricing.layer import price_route, step_time
from pkvsim.serving.state import DECODE_STEPS, DECODING, PAPER, SAMPLE_STRIDE, SAMPLES, SAMPLES_USED


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
    lens = state.lens[:count]
    route, splits = -1, 0
    us, best_us = 0.0, 0.0
    for kind in range(1, -1, -1):  # full layers last, because their route is the step's
        if attention.layers[kind] > 0:
            for at in range(count):
                seen = state.cached[state.decoding[at]] + 1
                lens[at] = min(seen, attention.window) if kind else seen
            route, kind_us, kind_best_us, splits = _route(attention, lens, attention.layers[kind])
            us += kind_us
            best_us += kind_best_us
    _sample(state, lens, route, splits)
    return route, us, best_us


@inner
def _route(attention, lens, layers):
    """(route, us, us of the cheapest route, splits of every row or 0) of `layers` layers that see lens [rows]."""
    taken, taken_us, best_us = -1, math.inf, math.inf
    lengths = 0  # distinct ones: lens are sorted
    for row in range(len(lens)):
        lengths += row == 0 or lens[row] != lens[row - 1]
    for route in range(len(attention.constants)):
        if math.isnan(attention.constants[route, BANDWIDTH]):
            continue
        us = _price_us(attention, lens, lengths, layers, route, np.int64(0))  # a bare 0 would compile all twice
        best_us = min(best_us, us)
        if attention.allowed[route]:
            if attention.pinned:
                us = _price_us(attention, lens, lengths, layers, route, attention.pinned)
            if us < taken_us:
                taken, taken_us = route, us
    splits = attention.pinned
    if attention.rule == PAPER:
        choice, splits = paper_choice(
            lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
            attention.num_sms, attention.paper,
        )  # fmt: skip
        splits *= choice != FLASHINFER
        taken = attention.paper_routes[choice]
        taken_us = _price_us(attention, lens, lengths, layers, taken, splits)
    return taken, taken_us, best_us, splits


@inner
def _price_us(attention, lens, lengths, layers, route, splits):
    """What `layers` layers cost on a route, the host's part included; splits of every row, 0: the route's rule."""
    layer_us, _ = price_route(
        lens, attention.num_kv_heads, attention.group_size, attention.head_dim, attention.kv_element_bytes,
        attention.num_sms, attention.constants[route], splits,
    )  # fmt: skip
    gpu_us, host_us = step_time(attention.constants[route], len(lens), lengths, layers, layer_us)
    return gpu_us + host_us


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
