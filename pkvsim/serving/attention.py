"""Decode attention in the serving loop: which route it takes and what it costs. Compiled.

A decode step's layers cost what CalibratedPolicy.decide(layers=) says of them, by the wall clock: planning, the first
layer alone, and for every further one its kernel or the host's time to issue it, whichever is longer. The rest of the
layer, which would hide some of that time, does not: see ServingConfig.graphs for a server that issues nothing.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.compiled import inner, merged
from pkvsim.outside.pairs import entries_read
from pkvsim.policy.choose import PAPER, Routing, cheapest, price, price_contenders, take
from pkvsim.pricing.kv_parallel import first_ranks
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.prices import Candidates
from pkvsim.serving.selection.pages import (
    LISTED_BYTES,
    SCORED_BYTES,
    SELECTED_STEPS,
    SELECTION_SAVED_US,
    WHOLE_BYTES,
    select_pages,
)  # fmt: skip
from pkvsim.serving.shared.grouping import APART_BYTES, NUM_GROUPS, READ_BYTES, SAVED_US, SHARED_STEPS
from pkvsim.serving.shared.share import BALANCED_ROUTE, share_reads
from pkvsim.serving.state import DECODE_STEPS, SAMPLE_STRIDE, SAMPLES, SAMPLES_USED


@merged
def fill_lens(state, log, rows, query_tokens):
    """The tokens that each row that decodes attends to, its own of the step included, longest first, into log.lens."""
    for at in range(rows):
        log.lens[at] = state.cached[state.decoding[at]] + query_tokens


@merged
def decode_us(attention, log, rows):
    """(route of the last kind of layers or -1, us of the decode attention of all layers that have routes, us had every
    choice been the cheapest) for the first `rows` of log.lens, where log.grouping says which rows may read together."""
    route, splits = np.int64(-1), np.int64(0)  # bare numbers would compile what they are handed to twice
    us, best_us = 0.0, 0.0
    if rows == 0 or len(attention.layers) == 0:
        return route, us, best_us
    lens, totals = log.lens[:rows], log.grouping.totals
    together = attention.sharing.any and log.grouping.counts[NUM_GROUPS] > 0
    shared_bytes, whole_bytes = 0.0, 0.0
    for kind in range(len(attention.layers)):
        lens = log.lens[:rows]
        if not attention.whole[kind]:
            lens = _kernel_lens(attention.reads[kind], lens, log.kernel_lens[:rows])
        if attention.ranks > 1:
            lens = first_ranks(lens, np.int64(attention.heads[kind, 5]), attention.ranks, log.kernel_lens[:rows])
        routing = _routing(attention, kind, attention.pinned)
        price_contenders(lens, attention.layers[kind], routing, log.prices)
        read_bytes, apart_bytes, apart_us = 0.0, 0.0, 0.0
        if together and attention.sharing.kinds[kind]:
            apart_us = _us(log.prices, cheapest(routing.allowed, log.prices))
            read_bytes, apart_bytes = share_reads(
                lens, kind, attention.layers[kind], routing.heads, routing.candidates.constants[BALANCED_ROUTE],
                attention.sharing, log.grouping, log.prices,
            )  # fmt: skip
        listed, whole, scored, dense_us = 0.0, 0.0, 0.0, 0.0
        if attention.selecting.any and attention.selecting.layers[kind] > 0:
            dense_us = _us(log.prices, cheapest(routing.allowed, log.prices))
            listed, whole, scored = select_pages(
                lens, kind, attention.layers[kind], routing.heads, routing.candidates.constants[BALANCED_ROUTE],
                attention.selecting, log.prices,
            )  # fmt: skip
        our_best_us = _us(log.prices, BALANCED_ROUTE)
        kind_best_us = _cheapest_us(log.prices)
        route = take(lens, attention.layers[kind], routing, log.prices)
        us += _us(log.prices, route)
        if whole > 0 and route == BALANCED_ROUTE:  # what its dense layers read together is left out
            whole_bytes += whole
            log.selected[LISTED_BYTES] += listed
            log.selected[WHOLE_BYTES] += whole
            log.selected[SCORED_BYTES] += scored
            log.selected[SELECTION_SAVED_US] += dense_us - _us(log.prices, route)
        elif read_bytes > 0 and route == BALANCED_ROUTE:
            shared_bytes += read_bytes
            totals[APART_BYTES] += apart_bytes
            totals[SAVED_US] += apart_us - _us(log.prices, route)
        splits = attention.pinned[route]
        if attention.rule == PAPER and route != attention.paper_routes[kind, 0]:
            splits = log.prices.splits[route]
        if attention.any_pinned:
            price(lens, attention.layers[kind], _routing(attention, kind, attention.unpinned), log.prices)
            kind_best_us = min(our_best_us, _cheapest_us(log.prices))
        best_us += kind_best_us
    if attention.ranks > 1:
        us += attention.exchange_us[rows]
        best_us += attention.exchange_us[rows]
    if shared_bytes > 0:
        totals[SHARED_STEPS] += 1
        totals[READ_BYTES] += shared_bytes
    if whole_bytes > 0:
        log.selected[SELECTED_STEPS] += 1
    if shared_bytes == 0 and whole_bytes == 0:  # the sample is simulated with every row reading all for itself
        _sample(log, lens, route, splits)
    return route, us, best_us


@inner
def _kernel_lens(reads, lens, found):
    """Chunks and selected entries are shorter rows to a kernel; longest first again."""
    for row in range(len(lens)):
        found[row] = entries_read(reads[0], reads[1], reads[2], reads[3], lens[row])
    gap = len(found) // 2
    while gap > 0:  # Shell's sort: NumPy's takes a second more to compile
        for row in range(gap, len(found)):
            length, at = found[row], row
            while at >= gap and found[at - gap] < length:
                found[at] = found[at - gap]
                at -= gap
            found[at] = length
        gap //= 2
    return found


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
def _us(prices, route):
    """The step's time by the wall clock on a route."""
    return prices.gpu_us[route] + prices.host_us[route]


@inner
def _cheapest_us(prices):
    """The least price of any candidate, allowed or not."""
    best = math.inf
    for route in range(len(prices.gpu_us)):
        best = min(best, _us(prices, route))
    return best


@inner
def _sample(log, lens, route, splits):
    """Keeps every SAMPLE_STRIDE-th decode step's lengths and route; a full sample is thinned to half."""
    counts = log.counts
    if counts[DECODE_STEPS] % counts[SAMPLE_STRIDE]:
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
