"""Attention in the serving loop: which route decode takes and what it costs, and what prefill costs. Compiled.

A decode step's layers cost what CalibratedPolicy.decide(layers=) says of them, by the wall clock: planning, the first
layer alone, and for every further one its kernel or the host's time to issue it, whichever is longer. The rest of the
layer, which would hide some of that time, does not: see ServingConfig.graphs for a server that issues nothing.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner
from pkvsim.policy.choose import PAPER, Routing, price, take
from pkvsim.pricing.constants import merged
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.prices import Candidates
from pkvsim.serving.kv_parallel import first_ranks
from pkvsim.serving.state import DECODE_STEPS, NUM_DECODING, SAMPLE_STRIDE, SAMPLES, SAMPLES_USED


@inner
def prefill_attention_us(attention, begin, chunk):
    """Attention of tokens [begin, begin + chunk) of a prompt, causal, over all layers."""
    us = 0.0
    for kind in range(len(attention.layers)):
        window = attention.windows[kind] if attention.windows[kind] else begin + chunk
        growing = max(0, min(chunk, window - begin))  # tokens that see all before them
        pairs = growing * begin + growing * (growing + 1) / 2 + (chunk - growing) * window
        read = min(begin, window) + chunk
        compute_us = pairs * attention.prefill_us_per_pair[kind]
        us += attention.layers[kind] * max(compute_us, read * attention.prefill_us_per_token[kind])
    return us


@inner
def prefill_us(attention, state, first, end):
    """(tokens, us of their attention) of the step's chunks [first, end)."""
    tokens, us = np.int64(0), 0.0
    for at in range(first, end):
        tokens += state.chunk_tokens[at]
        us += prefill_attention_us(attention, state.chunk_begin[at], state.chunk_tokens[at])
    return tokens, us


@merged
def decode_us(attention, state, log):
    """(route of the last kind of layers or -1, us of all layers' decode attention, us had every choice been the
    cheapest)."""
    count = state.counts[NUM_DECODING]
    if count == 0:
        return -1, 0.0, 0.0
    lens = log.lens[:count]
    for at in range(count):
        lens[at] = state.cached[state.decoding[at]] + 1
    if attention.ranks > 1:
        first_ranks(lens, np.int64(attention.heads[0, 5]), attention.ranks)
    route, splits = np.int64(-1), np.int64(0)  # bare numbers would compile what they are handed to twice
    us, best_us = 0.0, 0.0
    for kind in range(len(attention.layers)):
        routing = _routing(attention, kind, attention.pinned)
        price(lens, attention.layers[kind], routing, log.prices)
        kind_best_us = _cheapest_us(log.prices)
        route = take(lens, attention.layers[kind], routing, log.prices)
        us += log.prices.gpu_us[route] + log.prices.host_us[route]
        splits = attention.pinned[route]
        if attention.rule == PAPER and route != attention.paper_routes[kind, 0]:
            splits = log.prices.splits[route]
        if attention.any_pinned:
            price(lens, attention.layers[kind], _routing(attention, kind, attention.unpinned), log.prices)
            kind_best_us = _cheapest_us(log.prices)
        best_us += kind_best_us
    if attention.ranks > 1:
        us += attention.exchange_us[count]
        best_us += attention.exchange_us[count]
    _sample(log, lens, route, splits)
    return route, us, best_us


@inner
def _routing(attention, kind, pinned):
    heads = attention.heads[kind]
    return Routing(
        Heads(int(heads[0]), int(heads[1]), int(heads[2]), int(heads[3]), heads[4], int(heads[5]), int(heads[6])),
        Candidates(attention.constants[kind], attention.reaches[kind], pinned),
        attention.allowed[kind],
        attention.rule,
        attention.paper,
        attention.paper_routes[kind],
    )


@inner
def _cheapest_us(prices):
    """The least price of any candidate, allowed or not."""
    best = math.inf
    for route in range(len(prices.gpu_us)):
        best = min(best, prices.gpu_us[route] + prices.host_us[route])
    return best


@inner
def _sample(log, lens, route, splits):
    """Keeps every SAMPLE_STRIDE-th decode step's lengths and route; a full sample is thinned to half."""
    counts = log.counts
    counts[DECODE_STEPS] += 1
    if (counts[DECODE_STEPS] - 1) % counts[SAMPLE_STRIDE]:
        return
    if counts[SAMPLES_USED] == SAMPLES:
        for at in range(SAMPLES // 2):
            for column in range(log.sample_choice.shape[1]):
                log.sample_choice[at, column] = log.sample_choice[2 * at, column]
            for row in range(log.sample_choice[at, 0]):
                log.sample_lens[at, row] = log.sample_lens[2 * at, row]
        counts[SAMPLES_USED] = SAMPLES // 2
        counts[SAMPLE_STRIDE] *= 2
    at = counts[SAMPLES_USED]
    for row in range(len(lens)):
        log.sample_lens[at, row] = lens[row]
    log.sample_choice[at, 0] = len(lens)
    log.sample_choice[at, 1] = route
    log.sample_choice[at, 2] = splits
    counts[SAMPLES_USED] += 1
