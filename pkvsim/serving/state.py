"""What the serving loop reads and writes: named tuples of arrays, as compiled code takes them.

n requests, R routes, K kinds of attention layers, times in us. Requests keep their place in the trace as their id.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.memory.prefix_cache import PagePool, PromptBlocks, page_pool
from pkvsim.outside.step_costs import PARTS
from pkvsim.policy.choose import Prices, new_prices
from pkvsim.policy.paper_rules import PaperRules
from pkvsim.serving.orders import FCFS, KVSHARE
from pkvsim.serving.selection.pages import NUM_SELECTED, Selecting
from pkvsim.serving.shared.grouping import Grouping, new_grouping
from pkvsim.serving.shared.share import Sharing
from pkvsim.serving.tier_gate import TierGate, new_gate

SERVED, TOO_LONG_FOR_POOL, TOO_LONG_FOR_MODEL = range(3)  # why a request is rejected
# Where a request that is served stands. LEAVING: its last token is being computed, and it holds its pages until then.
WAITING, PREFILLING, DECODING, PREEMPTED, LEAVING, FINISHED = range(6)
# Of SchedulerState.counts: the lengths of `running`, `decoding`, `waiting` and of the chunks, those of requests just
# admitted from FIRST_ADMITTED on; preempted by the step; 1 while no page is free for the next to be admitted; the
# lengths of `held`, `beginning` and `leaving`; 1 where rows do not decode in the step, as it computes prompts.
(
    NUM_RUNNING, NUM_DECODING, NUM_WAITING, NUM_CHUNKS, FIRST_ADMITTED, JUST_PREEMPTED, POOL_FULL, NUM_HELD,
    NUM_BEGINNING, NUM_LEAVING, ROWS_WAIT,
) = range(11)  # fmt: skip
NUM_COUNTS = 11
# Of Clients.counts: the trace up to NEXT_ARRIVAL is due or follows others; the length of `due`; sent and not ended;
# sent. Of Clients.times: before NEXT_SEND nothing is sent.
NEXT_ARRIVAL, NUM_DUE, IN_FLIGHT, NUM_SENT = range(4)
NEXT_SEND = 0

LOG_CAPACITY = 1 << 16  # steps kept singly; twice as many are kept in pairs, and so on
SAMPLES = 64  # most decode steps whose lengths are kept, evenly over the run
# Of RunLog.counts; PLANNED is 1 while a step runs that ends at the clock's time, FOLLOWING while the one that begins
# then has been planned.
STEPS, LOG_USED, LOG_STRIDE, LOG_FILL, DECODE_STEPS, SAMPLES_USED, SAMPLE_STRIDE, PLANNED, FOLLOWING = range(9)
# Of RunLog.clock_us: the time, the end of the latest step, the GPU's heat, when that step's tokens reach their clients.
CLOCK, BUSY_UNTIL, HEAT, DELIVERED = range(4)
# Columns of the step log, and of the totals.
LOG_COLUMNS = (
    "start_us", "duration_us", "rows", "decode_rows", "prefill_tokens", "waiting", "pages",
    "attention_us", "rest_us", "prefill_us", "best_attention_us",
)  # fmt: skip
(START, DURATION, ROW_COUNT, DECODE_ROWS, PREFILL_TOKENS, WAITING_COUNT, PAGES, ATTENTION, REST, PREFILL, BEST) = range(
    len(LOG_COLUMNS)
)


# Times between a request's tokens are counted in bins of half a percent.
GAP_BINS, GAPS_PER_E = 4096, 200


class Requests(NamedTuple):
    """The requests."""

    arrival_us: np.ndarray  # [n] float64, non-decreasing
    prompt: np.ndarray  # [n] int64, tokens
    output: np.ndarray  # [n] int64, tokens
    rejected: np.ndarray  # [n] int8, SERVED or why not
    blocks: PromptBlocks
    shared: np.ndarray  # [n] int64, tokens of the prompt that lie in blocks; those after them begin a page of their own
    after: np.ndarray  # [n] int32, the earlier request that it follows, -1 none; [0] where all are -1
    think_us: np.ndarray  # [n] or [0] float64, from the end of that one until it is due
    concurrency: int  # most requests that are sent and not ended, 0 for no limit
    rank: np.ndarray  # [n] float64, before any has run; of pkvsim.serving.orders
    queue_us: float = 0.0  # between a request's submission and the scheduler's queue
    output_us: float = 0.0  # between a step's end and its tokens at the client
    remote: np.ndarray = np.zeros(0, np.int64)  # [n] or [0], tokens of a prompt whose KV comes with its request
    # Where rows read blocks together: tokens of a block, but for what is left in a prompt's last; and
    # pkvsim.serving.shared.grouping.block_places.
    block_tokens: int = 0
    block_places: np.ndarray = np.zeros((0, 4), np.int64)  # [n, 4]


class Limits(NamedTuple):
    """The scheduler's numbers."""

    page_size: int
    num_pages: int
    keep_free: int  # pages that an admission leaves free while other requests run
    max_batch: int
    step_tokens: int  # most tokens of a step, decode rows and prefill chunks together
    cache_kind: int  # index into prefix_cache.KINDS
    order: int = FCFS  # index into orders.ORDERS
    hold_us: float = 0.0  # how long a request's KV is kept for the one that follows it
    tiers: bool = False  # whether admitted requests ask a pool of KV beyond HBM
    by_chunk: bool = False  # an admission asks for the pages of the coming chunk, not of the whole prompt
    reserve_output: float = 0.0  # of the tokens still to come, for which an admission takes pages as well
    mixes: bool = True  # False: rows do not decode in a step that computes prompts
    query_tokens: int = 1  # of a row that decodes: one, and the drafts that the step checks
    acceptance: float = 0.0  # probability that a draft is accepted where those before it were
    draft_cost: float = 0.0  # time of drafting one token for all rows, as a part of their step without drafts
    draft_seed: int = 0
    state_pages: int = 0  # that a running request's recurrent states take, beside those of its tokens


class Clients(NamedTuple):
    """Who has sent what, and when the rest is due. f is n, or 0 where no request follows another."""

    counts: np.ndarray  # [4] int64
    times: np.ndarray  # [1] float64
    free_us: np.ndarray  # [min(concurrency, n)] float64, a heap: since when each free slot is free, the earliest on top
    concurrency: int
    turnaround_us: float  # from a step's end to the queue: its tokens to the client, whose next request comes
    rejected: np.ndarray  # [n] int8
    after: np.ndarray  # [f] int32
    think_us: np.ndarray  # [f] float64
    first_follower: np.ndarray  # [f] int32, a request that follows, -1 none
    next_follower: np.ndarray  # [f] int32, another one that follows the same, -1 none
    due_us: np.ndarray  # [n] float64, in the queue; of what follows others until their end, the earliest it can be
    due: np.ndarray  # [f] int64, a heap of what follows others that have ended, the earliest on top
    sent_us: np.ndarray  # [n] float64, NaN before
    place: np.ndarray  # [n] int64, how many were sent before


class SchedulerState(NamedTuple):
    """Where every request stands, who runs, and what the step is made of."""

    counts: np.ndarray  # [NUM_COUNTS] int64
    phase: np.ndarray  # [n] int8, WAITING to FINISHED
    running: np.ndarray  # [max_batch] int64, prefilling, decoding and leaving requests in order of admission
    decoding: np.ndarray  # [max_batch] int64, the decoding ones, longest first
    waiting: np.ndarray  # [n] int64, a heap of what was sent and does not run, the next to run on top
    rank: np.ndarray  # [n] float64, what is to run first has the least
    finds_hits: bool  # whether the next to run is the one with the largest part in the prefix cache
    preempted: np.ndarray  # [max_batch] int64, by the step
    paused_us: np.ndarray  # [n] float64, when a preempted request gave its latest token
    held: np.ndarray  # [f] int64, ended requests whose pages are kept for those that follow them
    beginning: np.ndarray  # [max_batch] int64, requests whose first token the running step computes
    leaving: np.ndarray  # [max_batch] int64, requests whose last token the running step computes
    chunk_request: np.ndarray  # [max_batch] int64, prompts of which the step computes tokens
    chunk_begin: np.ndarray  # [max_batch] int64, the first of these tokens
    chunk_tokens: np.ndarray  # [max_batch] int64, how many
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
    pool: PagePool
    clients: Clients
    gate: TierGate


class Attention(NamedTuple):
    """How a step's decode attention is routed and priced, by kind of layer that has routes; the last kind is the one
    whose route is called the step's. No kind: all decode attention is priced by pkvsim.outside."""

    layers: np.ndarray  # [K] int64, layers of the kind
    reads: np.ndarray  # [K, 4] int64, what a row is to a kernel: kind, window, selected and tokens per entry
    whole: np.ndarray  # [K] bool, whether that is the row itself
    heads: np.ndarray  # [K, 7] float64, the fields of pkvsim.pricing.layer.Heads
    constants: np.ndarray  # [K, R, NUM_CONSTANTS] float64, NaN for routes that are no candidates
    reaches: np.ndarray  # [K, R] int64
    allowed: np.ndarray  # [K, R] bool
    pinned: np.ndarray  # [R] int64, splits of every row, 0: what the route's own rule chooses
    unpinned: np.ndarray  # [R] int64, zeros
    any_pinned: bool
    rule: int  # of pkvsim.policy.choose
    paper: PaperRules
    paper_routes: np.ndarray  # [K, 3] int64
    ranks: int  # GPUs that hold every row's KV together
    exchange_us: np.ndarray  # [rows + 1] float64, what they send each other in a step of so many rows
    sharing: Sharing
    selecting: Selecting


class RunLog(NamedTuple):
    """What a run leaves behind of its steps, and room for the step being priced."""

    clock_us: np.ndarray  # [4] float64
    counts: np.ndarray  # [9] int64
    lens: np.ndarray  # [max_batch] int64, scratch: lengths of decoding
    kernel_lens: np.ndarray  # [max_batch] int64, scratch: what they are to a kind's kernel
    parts: np.ndarray  # [len(pkvsim.outside.step_costs.PARTS)] float64, scratch
    prices: Prices  # scratch
    totals: np.ndarray  # [len(LOG_COLUMNS)] float64, sums over steps
    part_totals: np.ndarray  # [len(pkvsim.outside.step_costs.PARTS)] float64, sums over steps
    route_steps: np.ndarray  # [R] int64, decode steps by the route of their last kind of layers
    log: np.ndarray  # [LOG_CAPACITY, len(LOG_COLUMNS)] float64, sums over the steps of an entry
    log_routes: np.ndarray  # [LOG_CAPACITY, R] float64, steps of the entry on each route
    gaps: np.ndarray  # [GAP_BINS] int64, times between tokens: bin i from exp(i / GAPS_PER_E) us on
    sample_lens: np.ndarray  # [SAMPLES, max_batch] int64, lengths of a decode step, longest first
    sample_choice: np.ndarray  # [SAMPLES, 3] int64: rows, route, splits of every row (0: the route's own rule)
    grouping: Grouping
    selected: np.ndarray  # [NUM_SELECTED] float64, sums over the steps that read selected pages


def new_clients(requests: Requests) -> Clients:
    """Nothing was sent."""
    n, follow = len(requests.prompt), len(requests.after)
    first, following = np.full(follow, -1, np.int32), np.full(follow, -1, np.int32)
    for request in np.flatnonzero(requests.after >= 0)[::-1]:  # so that the earliest comes first
        following[request] = first[requests.after[request]]
        first[requests.after[request]] = request
    return Clients(
        counts=np.zeros(4, np.int64),
        times=np.zeros(1),
        free_us=np.zeros(min(requests.concurrency, n)),
        concurrency=requests.concurrency,
        turnaround_us=float(requests.queue_us + requests.output_us),
        rejected=requests.rejected,
        after=requests.after,
        think_us=requests.think_us,
        first_follower=first,
        next_follower=following,
        due_us=requests.arrival_us + requests.queue_us,
        due=np.zeros(follow, np.int64),
        sent_us=np.full(n, np.nan),
        place=np.zeros(n, np.int64),
    )


def new_scheduler_state(requests: Requests, limits: Limits) -> SchedulerState:
    """Nothing has arrived."""
    n = len(requests.prompt)
    most = min(limits.max_batch, n)
    return SchedulerState(
        counts=np.zeros(NUM_COUNTS, np.int64),
        phase=np.full(n, WAITING, np.int8),
        running=np.zeros(most, np.int64),
        decoding=np.zeros(most, np.int64),
        waiting=np.zeros(n, np.int64),
        rank=requests.rank.copy(),
        finds_hits=limits.order == KVSHARE,
        preempted=np.zeros(most, np.int64),
        paused_us=np.full(n, np.nan),
        held=np.zeros(len(requests.after), np.int64),
        beginning=np.zeros(most, np.int64),
        leaving=np.zeros(most, np.int64),
        chunk_request=np.zeros(most, np.int64),
        chunk_begin=np.zeros(most, np.int64),
        chunk_tokens=np.zeros(most, np.int64),
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
        pool=page_pool(requests.blocks, limits.num_pages),
        clients=new_clients(requests),
        gate=new_gate(n, limits.tiers),
    )


def new_log(num_requests: int, num_routes: int, limits: Limits) -> RunLog:
    """No step has run."""
    most = min(limits.max_batch, num_requests)
    counts = np.zeros(9, np.int64)
    counts[LOG_STRIDE] = counts[SAMPLE_STRIDE] = 1
    return RunLog(
        clock_us=np.array([0.0, -1.0, 0.0, 0.0]),
        counts=counts,
        lens=np.zeros(most, np.int64),
        kernel_lens=np.zeros(most, np.int64),
        parts=np.zeros(len(PARTS)),
        prices=new_prices(),
        totals=np.zeros(len(LOG_COLUMNS)),
        part_totals=np.zeros(len(PARTS)),
        route_steps=np.zeros(num_routes, np.int64),
        log=np.zeros((LOG_CAPACITY, len(LOG_COLUMNS))),
        log_routes=np.zeros((LOG_CAPACITY, num_routes)),
        gaps=np.zeros(GAP_BINS, np.int64),
        sample_lens=np.zeros((SAMPLES, most), np.int64),
        sample_choice=np.zeros((SAMPLES, 3), np.int64),
        grouping=new_grouping(most, num_requests),
        selected=np.zeros(NUM_SELECTED),
    )
