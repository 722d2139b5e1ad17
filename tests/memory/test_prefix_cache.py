"""The prefix cache beside a model in dictionaries: who is let in, which blocks go, and what stays resident."""
from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.compiled.parts import borrowing_options
from pkvsim.memory.prefix_cache import (
    BELADY,
    EVICTABLE_PAGES,
    FREE_PAGES,
    LRU,
    PromptBlocks,
    acquire,
    free,
    page_pool,
    release,
)

TOKENS = 4  # of a block
# Not kept on disk: Numba would go on with what it compiled of an older prefix_cache.
compiled = numba.njit(error_model="numpy", **borrowing_options(True))


@compiled
def take(pool, blocks, kind, request, private, keep_free):
    return acquire(pool, blocks, kind, request, private, keep_free)


@compiled
def give(pool, blocks, kind, request, private, computed):
    free(pool, private)
    release(pool, blocks, kind, request, computed)


class Model:
    """Blocks with their users, and the keys of those that nobody uses: the largest goes first."""

    def __init__(self, prompts, following, sizes, num_pages, kind) -> None:
        self.prompts, self.following, self.sizes, self.kind = prompts, following, sizes, kind
        self.free, self.users, self.keys, self.next, self.released = num_pages, {}, {}, {}, 0

    def take(self, request, private, keep_free, gone) -> bool:
        """gone: blocks that are not there afterwards, which say who goes of those whose keys are equal."""
        own = self.prompts[request]
        need = private + sum(self.sizes[block] for block in own if block not in self.users)
        others = sum(self.sizes[block] for block in self.keys if block not in own)
        if self.free + others < need + keep_free:
            return False
        for block, following in zip(own, self.following[request]):
            self.users[block] = self.users.get(block, 0) + 1
            self.next[block] = following
            self.keys.pop(block, None)
        while self.free < need:
            victim = max(self.keys, key=lambda block: (self.keys[block], block in gone))
            self.free += self.sizes[victim]
            del self.keys[victim], self.users[victim]
        self.free -= need
        return True

    def give(self, request, private, computed) -> None:
        self.free += private
        own = self.prompts[request]
        for depth in range(len(own) - 1, -1, -1):
            block = own[depth]
            self.users[block] -= 1
            if self.users[block] == 0 and (depth + 1) * TOKENS > computed:
                del self.users[block]
                self.free += self.sizes[block]
            elif self.users[block] == 0:
                self.released += 1
                self.keys[block] = (self.next[block], depth) if self.kind == BELADY else (-self.released,)


@settings(max_examples=150)
@given(st.data(), st.sampled_from([LRU, BELADY]), st.integers(4, 16))
def test_who_is_let_in_and_what_goes(data, kind, num_pages) -> None:
    paths = st.tuples(st.integers(0, 2), st.integers(0, 4)).map(lambda path: [10 * path[0] + d for d in range(path[1])])
    prompts = data.draw(st.lists(paths, min_size=1, max_size=14))
    names = sorted({block for prompt in prompts for block in prompt})
    dense = [[names.index(block) for block in prompt] for prompt in prompts]
    following = [[next((later for later in range(at + 1, len(dense)) if block in dense[later]), len(dense))
                  for block in prompt] for at, prompt in enumerate(dense)]  # fmt: skip
    sizes = np.array([1 + name % 2 for name in names], np.int32)
    blocks = PromptBlocks(
        np.concatenate(([0], np.cumsum([len(prompt) for prompt in dense]))).astype(np.int64),
        np.array([block for prompt in dense for block in prompt], np.int32),
        np.array([at for ats in following for at in ats], np.int64), np.full(len(names), TOKENS, np.int32), sizes,
    )  # fmt: skip
    pool, model, running = page_pool(blocks, num_pages), Model(dense, following, sizes.tolist(), num_pages, kind), []
    for request in range(len(dense)):
        private, keep_free = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
        while len(running) > 2 or (running and data.draw(st.booleans())):
            leaving, pages = running.pop(0)
            computed = data.draw(st.just(99) | st.integers(0, 4 * TOKENS))
            give(pool, blocks, kind, leaving, pages, computed)
            model.give(leaving, pages, computed)
        admitted = take(pool, blocks, kind, request, private, keep_free)
        gone = set(np.flatnonzero(pool.users < 0).tolist())
        assert admitted == model.take(request, private, keep_free, gone)
        if admitted:
            running.append((request, private))
        assert pool.users.tolist() == [model.users.get(block, -1) for block in range(len(names))]
        assert pool.counts[FREE_PAGES] == model.free
        assert pool.counts[EVICTABLE_PAGES] == sum(model.sizes[block] for block in model.keys)


@pytest.mark.parametrize("kind", [LRU, BELADY])
def test_of_a_prompt_that_nobody_follows_the_deepest_block_goes_first(kind) -> None:
    blocks = PromptBlocks(np.array([0, 3, 3], np.int64), np.arange(3, dtype=np.int32), np.full(3, 2, np.int64),
                          np.full(3, TOKENS, np.int32), np.ones(3, np.int32))  # fmt: skip
    pool = page_pool(blocks, 4)
    assert take(pool, blocks, kind, 0, 0, 0)
    give(pool, blocks, kind, 0, 0, 99)
    assert not take(pool, blocks, kind, 1, 3, 2) and take(pool, blocks, kind, 1, 2, 2)
    assert pool.users.tolist() == [0, 0, -1]
