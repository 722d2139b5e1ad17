"""Prompt blocks that requests share: which are resident, who uses them, which goes next.

A block is a run of prompt tokens named by its hash, which covers everything before it; equal hashes are
equal KV. Hits count from a prompt's start and end at the first block that is not resident. A resident
block is either in use by running requests or evictable. Pages of evictable blocks are as good as free: an
allocation evicts as many as it needs. What goes first is the policy: `lru` the block unused for longest,
`belady` the one whose next request is farthest away (requests are admitted in trace order, so that is
known), `infinite` keeps every block and charges evictable ones nothing. The deepest of blocks that tie
goes first, so residents always form whole prefixes.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import inner

KINDS = ("none", "lru", "infinite", "belady")
NONE, LRU, INFINITE, BELADY = range(len(KINDS))
FREE_PAGES, HEAP_SIZE, RELEASES, EVICTED, ALLOCATED, FREED, EVICTABLE_PAGES = range(7)  # of PagePool.counts
MAX_BLOCKS_PER_PROMPT = 2**20  # Belady's keys hold a block's depth in their low bits.


class PromptBlocks(NamedTuple):
    """The blocks of every prompt, numbered densely."""

    offsets: np.ndarray  # [n + 1] int64, request i has blocks [offsets[i], offsets[i + 1])
    ids: np.ndarray  # [total] int32
    next_request: np.ndarray  # [total] int64, next served request that has this block, n if none
    tokens: np.ndarray  # [num_ids] int32, tokens in a block
    pages: np.ndarray  # [num_ids] int32, pages a block takes


class PagePool(NamedTuple):
    """Pages of one GPU and the state of every block."""

    users: np.ndarray  # [num_ids] int32, running requests that hold the block, -1 not resident
    key: np.ndarray  # [num_ids] int64, of an evictable block: the largest is evicted first
    next_request: np.ndarray  # [num_ids] int64
    heap: np.ndarray  # [num_ids] int32, evictable blocks, largest key first
    place: np.ndarray  # [num_ids] int32, where in heap
    counts: np.ndarray  # [7] int64


def no_blocks(num_requests: int) -> PromptBlocks:
    """Prompts that share nothing."""
    return PromptBlocks(
        np.zeros(num_requests + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64),
        np.zeros(0, np.int32), np.zeros(0, np.int32),
    )  # fmt: skip


def page_pool(blocks: PromptBlocks, num_pages: int) -> PagePool:
    """An empty pool of `num_pages` pages."""
    num_ids = len(blocks.tokens)
    counts = np.zeros(7, np.int64)
    counts[FREE_PAGES] = num_pages
    return PagePool(
        users=np.full(num_ids, -1, np.int32),
        key=np.zeros(num_ids, np.int64),
        next_request=np.zeros(num_ids, np.int64),
        heap=np.zeros(num_ids, np.int32),
        place=np.zeros(num_ids, np.int32),
        counts=counts,
    )


@inner
def _sift(pool, at, block):
    """Puts `block` into the heap near position `at`, where its key belongs."""
    heap, place, key = pool.heap, pool.place, pool.key
    while at > 0 and key[heap[(at - 1) // 2]] < key[block]:
        heap[at] = heap[(at - 1) // 2]
        place[heap[at]] = at
        at = (at - 1) // 2
    size = pool.counts[HEAP_SIZE]
    while True:
        child = 2 * at + 1
        if child + 1 < size and key[heap[child + 1]] > key[heap[child]]:
            child += 1
        if child >= size or key[heap[child]] <= key[block]:
            break
        heap[at] = heap[child]
        place[heap[at]] = at
        at = child
    heap[at] = block
    place[block] = at


@inner
def _leave_heap(pool, block):
    pool.counts[HEAP_SIZE] -= 1
    at, last = pool.place[block], pool.heap[pool.counts[HEAP_SIZE]]
    if last != block:
        _sift(pool, at, last)


@inner
def allocate(pool, blocks, num_pages):
    """Takes num_pages from the pool, evicting as needed; False, and nothing taken, when it cannot."""
    counts = pool.counts
    if counts[FREE_PAGES] + counts[EVICTABLE_PAGES] < num_pages:
        return False
    while counts[FREE_PAGES] < num_pages:
        victim = pool.heap[0]
        _leave_heap(pool, victim)
        pool.users[victim] = -1
        counts[FREE_PAGES] += blocks.pages[victim]
        counts[EVICTABLE_PAGES] -= blocks.pages[victim]
        counts[FREED] += blocks.pages[victim]
        counts[EVICTED] += 1
    counts[FREE_PAGES] -= num_pages
    counts[ALLOCATED] += num_pages
    return True


@inner
def free(pool, num_pages):
    """Gives back num_pages private pages."""
    pool.counts[FREE_PAGES] += num_pages
    pool.counts[FREED] += num_pages


@inner
def resident_prefix(pool, blocks, request):
    """(blocks, tokens) of the request's prompt that are resident, counted from its start."""
    tokens = 0
    begin, end = blocks.offsets[request], blocks.offsets[request + 1]
    for at in range(begin, end):
        if pool.users[blocks.ids[at]] < 0:
            return at - begin, tokens
        tokens += blocks.tokens[blocks.ids[at]]
    return end - begin, tokens


@inner
def acquire(pool, blocks, kind, request, private_pages, keep_free):
    """Takes the request's blocks and private_pages in one go, leaving keep_free pages; False if it cannot."""
    counts = pool.counts
    need = private_pages
    revived = 0  # These pages of evictable blocks are put back to use by this request.
    for at in range(blocks.offsets[request], blocks.offsets[request + 1]):
        block = blocks.ids[at]
        if pool.users[block] < 0 or (kind == INFINITE and pool.users[block] == 0):
            need += blocks.pages[block]
        elif pool.users[block] == 0:
            revived += blocks.pages[block]
    if counts[FREE_PAGES] + counts[EVICTABLE_PAGES] - revived < need + keep_free:
        return False
    need = private_pages  # A block that a prompt names twice takes its pages once.
    for at in range(blocks.offsets[request], blocks.offsets[request + 1]):
        block = blocks.ids[at]
        pool.next_request[block] = blocks.next_request[at]
        if pool.users[block] < 0 or (kind == INFINITE and pool.users[block] == 0):
            need += blocks.pages[block]
            pool.users[block] = 0
        elif pool.users[block] == 0:
            _leave_heap(pool, block)
            counts[EVICTABLE_PAGES] -= blocks.pages[block]
        pool.users[block] += 1
    return allocate(pool, blocks, need)


@inner
def release(pool, blocks, kind, request, computed_tokens):
    """Ends a request's use of its blocks, deepest first; what was not computed leaves the cache."""
    counts = pool.counts
    begin, end = blocks.offsets[request], blocks.offsets[request + 1]
    tokens = 0
    for at in range(begin, end):
        tokens += blocks.tokens[blocks.ids[at]]
    for at in range(end - 1, begin - 1, -1):
        block = blocks.ids[at]
        whole = tokens <= computed_tokens
        tokens -= blocks.tokens[block]
        pool.users[block] -= 1
        if pool.users[block] > 0:
            continue
        if kind == INFINITE or not whole:
            free(pool, blocks.pages[block])
            if not whole:
                pool.users[block] = -1
            continue
        counts[RELEASES] += 1
        pool.key[block] = -counts[RELEASES]
        if kind == BELADY:
            pool.key[block] = pool.next_request[block] * MAX_BLOCKS_PER_PROMPT + (at - begin)
        counts[EVICTABLE_PAGES] += blocks.pages[block]
        counts[HEAP_SIZE] += 1
        _sift(pool, counts[HEAP_SIZE] - 1, block)
