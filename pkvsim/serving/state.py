"""What the serving loop reads and writes: named tuples of arrays, as compiled code takes them.

n requests, R routes, times in us. Requests keep their place in the trace as their id.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.memory.prefix_cache import PagePool, PromptBlocks
from pkvsim.policy.paper_rules import PaperRules

LOG_CAPACITY = 1 << 16  # steps kept singly; twice as many are kept in pairs, and so on
SAMPLES = 64  # most decode steps whose lengths are kept, evenly over the run
(WAITING_AT, NEXT_ARRIVAL, ROWS, DECODING, PREEMPTED, STEP, LOG_USED, LOG_STRIDE, LOG_FILL, DECODE_STEPS, SAMPLES_USED,
 SAMPLE_STRIDE, POOL_FULL) = range(13)  # of cursor  # fmt: skip
# Columns of the step log, and of the totals.
LOG_COLUMNS = (
    "start_us", "duration_us", "rows", "decode_rows", "prefill_tokens", "waiting", "pages",
    "attention_us", "rest_us", "prefill_us", "best_attention_us",
)  # fmt: skip
START, DURATION, ROW_COUNT, DECODE_ROWS, PREFILL_TOKENS, WAITING, PAGES, ATTENTION, REST, PREFILL, BEST = range(
    len(LOG_COLUMNS)
)
CHEAPEST, PAPER = range(2)  # how a policy decides
SERVED, TOO_LONG_FOR_POOL, TOO_LONG_FOR_MODEL = range(3)  # why a request is rejected


class Work(NamedTuple):
    """The requests."""

    arrival_us: np.ndarray  # [n] float64, non-decreasing
    prompt: np.ndarray  # [n] int64, tokens
    output: np.ndarray  # [n] int64, tokens
    rejected: np.ndarray  # [n] int8, SERVED or why not
    blocks: PromptBlocks


class Limits(NamedTuple):
    """The scheduler's numbers."""

    page_size: int
    num_pages: int
    keep_free: int  # pages that an admission leaves free while other requests run
    max_batch: int
    step_tokens: int  # most tokens of a step, decode rows and prefill chunks together
    cache_kind: int  # index into prefix_cache.KINDS


class Attention(NamedTuple):
    """How a step's decode attention is priced and routed, and what prefill attention costs."""

    layers: np.ndarray  # [2] int64: layers with full attention, layers with a sliding window
    window: int  # tokens that a sliding layer sees
    num_kv_heads: int
    group_size: int
    head_dim: int
    kv_element_bytes: int
    num_sms: int
    constants: np.ndarray  # [R, NUM_CONSTANTS] float64, NaN where the GPU has no model of the route
    rule: int  # CHEAPEST of the allowed routes, or PAPER
    allowed: np.ndarray  # [R] bool
    pinned: int  # splits of every row on the allowed routes, 0: what the route's own rule chooses
    paper: PaperRules
    paper_routes: np.ndarray  # [3] int64, the routes that stand for the paper's three
    prefill_us_per_pair: float  # one layer, one query token against one key token
    prefill_us_per_token: float  # one layer, reading one cached token


class State(NamedTuple):
    """Everything that changes from step to step."""

    clock_us: np.ndarray  # [1] float64
    cursor: np.ndarray  # [13] int64
    rows: np.ndarray  # [max_batch] int64, running requests in trace order
    decoding: np.ndarray  # [max_batch] int64, those past prefill, longest first
    preempted: np.ndarray  # [max_batch + 1] int64, waiting to be recomputed, earliest on top
    cached: np.ndarray  # [n] int64, tokens in the cache
    target: np.ndarray  # [n] int64, tokens to be in the cache before the next token is decoded
    generated: np.ndarray  # [n] int64
    private_pages: np.ndarray  # [n] int64, pages that no other request shares
    start_us: np.ndarray  # [n] float64, first admission, NaN before
    first_token_us: np.ndarray  # [n] float64
    finish_us: np.ndarray  # [n] float64
    preemptions: np.ndarray  # [n] int32
    hit_blocks: np.ndarray  # [n] int32, at first admission
    hit_tokens: np.ndarray  # [n] int64, at first admission
    lens: np.ndarray  # [max_batch] int64, scratch: lengths of decoding
    totals: np.ndarray  # [len(LOG_COLUMNS)] float64, sums over steps
    route_steps: np.ndarray  # [R] int64, decode steps by the route of their full-attention layers
    log: np.ndarray  # [LOG_CAPACITY, len(LOG_COLUMNS)] float64, sums over the steps of an entry
    log_routes: np.ndarray  # [LOG_CAPACITY, R] float64, steps of the entry on each route
    sample_lens: np.ndarray  # [SAMPLES, max_batch] int64, lengths of a decode step, longest first
    sample_choice: np.ndarray  # [SAMPLES, 3] int64: rows, route, splits of every row (0: the route's own rule)
    pool: PagePool


def new_state(num_requests: int, num_routes: int, limits: Limits, pool: PagePool) -> State:
    """Nothing has arrived."""
    n, most = num_requests, min(limits.max_batch, num_requests)
    cursor = np.zeros(13, np.int64)
    cursor[LOG_STRIDE] = cursor[SAMPLE_STRIDE] = 1
    return State(
        clock_us=np.zeros(1),
        cursor=cursor,
        rows=np.zeros(most, np.int64),
        decoding=np.zeros(most, np.int64),
        preempted=np.zeros(most + 1, np.int64),
        cached=np.zeros(n, np.int64),
        target=np.zeros(n, np.int64),
        generated=np.zeros(n, np.int64),
        private_pages=np.zeros(n, np.int64),
        start_us=np.full(n, np.nan),
        first_token_us=np.full(n, np.nan),
        finish_us=np.full(n, np.nan),
        preemptions=np.zeros(n, np.int32),
        hit_blocks=np.zeros(n, np.int32),
        hit_tokens=np.zeros(n, np.int64),
        lens=np.zeros(most, np.int64),
        totals=np.zeros(len(LOG_COLUMNS)),
        route_steps=np.zeros(num_routes, np.int64),
        log=np.zeros((LOG_CAPACITY, len(LOG_COLUMNS))),
        log_routes=np.zeros((LOG_CAPACITY, num_routes)),
        sample_lens=np.zeros((SAMPLES, most), np.int64),
        sample_choice=np.zeros((SAMPLES, 3), np.int64),
        pool=pool,
    )
