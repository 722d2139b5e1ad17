"""Prefix reuse: hits against the trace's own count, independent models of LRU, and the order of the bounds."""
from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from paths import SHARED
from serving_cases import BLOCK_TOKENS, DEVICE, MODEL, crowded, kv_gib, make_trace

from pkvsim.serving.costs import page_budget
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import SERVED

MOONCAKE = SHARED / "traces" / "mooncake_conversation.jsonl"


def run(trace, config, prefix_cache):
    return simulate(trace, MODEL, DEVICE, "balanced", replace(config, prefix_cache=prefix_cache))


@settings(max_examples=80, deadline=None)
@given(crowded(blocks=True))
def test_an_infinite_cache_hits_what_was_seen_before(case) -> None:
    trace, config = case
    result = run(trace, config, "infinite")
    seen: set[int] = set()
    expected = np.zeros(len(trace), np.int64)
    for request in (result.requests.rejected == SERVED).nonzero()[0]:
        blocks = trace.block_hashes[trace.block_offsets[request] : trace.block_offsets[request + 1]].tolist()
        expected[request] = sum(block in seen for block in blocks)
        seen.update(blocks)
    np.testing.assert_array_equal(result.requests.hit_blocks, expected)


@settings(max_examples=150, deadline=None)
@given(crowded(blocks=True, serial=True))
def test_lru_hits_at_most_belady_hits_at_most_infinite(case) -> None:
    """One request at a time, so that every policy sees the same demand for pages and Belady's choice is optimal."""
    trace, config = case
    whole = np.maximum(BLOCK_TOKENS, trace.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS)  # blocks of one size
    trace = make_whole(trace, whole)
    pool_tokens = page_budget(MODEL, DEVICE, config) * config.page_size
    assume((whole + trace.output_tokens).min() + config.page_size <= pool_tokens)
    lru, belady, infinite = (
        int(run(trace, config, name).requests.hit_blocks.sum()) for name in ("lru", "belady", "infinite")
    )
    assert lru <= belady <= infinite


def test_belady_expects_nothing_of_requests_that_are_rejected() -> None:
    """Five prompts of one block on a pool of two; the fourth, which shares the first's, is too long to be served."""
    rows = [(0.0, 32, 1, [0]), (0.0, 32, 1, [1]), (0.0, 32, 1, [2]), (0.0, 32, 34, [0]), (0.0, 32, 1, [1])]
    config = ServingConfig(max_batch=1, kv_gib=kv_gib(4), keep_free_fraction=0.0)
    result = run(make_trace(rows, blocks=True), config, "belady")
    assert (result.requests.rejected != SERVED).tolist() == [False, False, False, True, False]
    assert result.requests.hit_blocks.tolist() == [0, 0, 0, 0, 1]


def make_whole(trace, prompt):
    """The same trace with every prompt a whole number of blocks."""
    offsets = np.append(0, np.cumsum(prompt // BLOCK_TOKENS))
    ids = [
        trace.block_hashes[begin : begin + count] for begin, count in zip(trace.block_offsets, prompt // BLOCK_TOKENS)
    ]
    return replace(trace, prompt_tokens=prompt, block_hashes=np.concatenate(ids), block_offsets=offsets)


@settings(max_examples=80, deadline=None)
@given(crowded(blocks=True, serial=True))
def test_lru_is_an_ordered_dict(case) -> None:
    """One request at a time against a cache of blocks written down independently."""
    trace, config = case
    result = run(trace, config, "lru")
    pages_of = lambda tokens: -(-tokens // config.page_size)  # noqa: E731
    cache: OrderedDict[int, int] = OrderedDict()  # evictable blocks and their pages, next to go first
    for request in (result.requests.rejected == SERVED).nonzero()[0]:
        ids = trace.block_hashes[trace.block_offsets[request] : trace.block_offsets[request + 1]].tolist()
        left = int(trace.prompt_tokens[request])
        blocks = {block: pages_of(min(BLOCK_TOKENS, left - at * BLOCK_TOKENS)) for at, block in enumerate(ids)}
        hits = 0
        while hits < len(ids) and ids[hits] in cache:
            hits += 1
        assert result.requests.hit_blocks[request] == hits
        for block in blocks:
            cache.pop(block, None)
        held = sum(blocks.values()) + pages_of(int(trace.output_tokens[request]) - 1)
        while cache and sum(cache.values()) + held > result.num_pages:
            cache.popitem(last=False)
        for block in reversed(ids):
            cache[block] = blocks[block]


def test_a_shared_block_takes_its_pages_once() -> None:
    """Sixteen requests of one prompt fit a pool that holds the prompt once."""
    trace = make_trace([(0, 320, 4, [0])] * 16, blocks=True)
    config = ServingConfig(kv_gib=kv_gib(20 + 16), keep_free_fraction=0)
    shared, alone = run(trace, config, "lru"), run(trace, config, "none")
    assert shared.steps.rows.max() == 16 and shared.requests.preemptions.sum() == 0
    assert shared.requests.hit_tokens.tolist() == [0] + [319] * 15  # the last token is computed for its output
    assert alone.steps.rows.max() == 1
    assert shared.summary["makespan_s"] < alone.summary["makespan_s"]


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake trace is not part of the repository")
def test_mooncake() -> None:
    from pkvsim.traces.readers import load_requests
    from pkvsim.traces.requests import first_requests

    trace = load_requests(MOONCAKE)
    blocks = run(trace, ServingConfig(), "infinite").requests.hit_blocks.sum()
    assert blocks == 105_710 and round(blocks / len(trace.block_hashes), 3) == 0.366
    part = first_requests(trace, 3000)
    hits = [int(run(part, ServingConfig(), name).requests.hit_blocks.sum()) for name in ("lru", "belady", "infinite")]
    assert 0 < hits[0] < hits[1] < hits[2]
