"""Rows of a paged pool that share, select, evict, grow and end, and what the host knows of them; on a GPU or a fake one.

A lane is what has a table of its own: a row of a PagedKVCache, or a KV head of one in a PagedHeadCache. Pages that no
lane has hold NaN, and results are compared with float64 attention over what was written and kept.
"""
from __future__ import annotations

import numpy as np

from pkvsim import DecodeShape, PageList, reference
from pkvsim.reference.selected import tokens_of
from pkvsim.selection.evictions import Seen, kept_pages
from pkvsim.selection.rules import Budget, Pins

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
ROWS, MAX_PAGES, POOL_PAGES = 4, 10, 26  # pages of all heads
MAX_LEN = MAX_PAGES * SHAPE.page_size
BUDGET, PINS = Budget(0.4, 1), Pins(1, 1)
MAX_ERROR = 4e-3  # of 16-bit outputs of values near 1


class EvictingRows:
    """One pool with its engine. `begin` empties it, so that examples share what is compiled."""

    def __init__(self, *, per_head: bool, layers: int = 1) -> None:
        """layers: of which the last one is used; per_head alone has several."""
        import cupy

        from gpu.cache.head_pool import PagedHeadCache
        from gpu.cache.pool import PagedKVCache
        from gpu.decode_engine import DecodeEngine
        from gpu.selection.page_selector import PageSelector
        from gpu.selection.page_summaries import PageSummaries

        self.cupy, self.layer = cupy, layers - 1
        self.lanes = SHAPE.num_kv_heads if per_head else 1  # of a row
        if per_head:
            self.cache = PagedHeadCache(SHAPE, num_layers=layers, num_pages=POOL_PAGES * self.lanes, max_batch=ROWS,
                                        max_seq_len=MAX_LEN)
            self.shape = self.cache.head_shape
        else:
            self.cache = PagedKVCache(SHAPE, num_pages=POOL_PAGES, max_batch=ROWS, max_seq_len=MAX_LEN)
            self.shape = SHAPE
        self.engine = DecodeEngine(self.shape)
        self.selector = PageSelector(self.shape, budget=BUDGET, pins=PINS)
        self.summaries = PageSummaries(self.shape, self.cache.k_pages)
        self.tokens: dict[int, np.ndarray] = {}  # by lane, [length, 2, heads of a page, head_dim] float16, K and V

    @property
    def rows(self) -> list[int]:
        return sorted({lane // self.lanes for lane in self.tokens})

    @property
    def unused(self) -> list[int]:
        return sorted(set(range(ROWS)) - set(self.rows))

    def lanes_of(self, row: int) -> list[int]:
        return [row * self.lanes + lane for lane in range(self.lanes)]

    def begin(self) -> None:
        for row in self.rows:
            self.free(row)
        self.poison(slice(None))

    def poison(self, pages: object) -> None:
        for pool in (self.cache.k_pages, self.cache.v_pages):
            pool[pages] = np.nan

    def open(self, row: int) -> None:
        self.cache.allocate(row)
        empty = np.zeros((0, 2, SHAPE.num_kv_heads // self.lanes, SHAPE.head_dim), np.float16)
        self.tokens |= {lane: empty for lane in self.lanes_of(row)}

    def grow(self, row: int, count: int, seed: int) -> None:
        """As many tokens as fit; one of them as a decode step appends it."""
        lanes, size = self.lanes_of(row), SHAPE.page_size
        longest = max(len(self.tokens[lane]) for lane in lanes)
        room = self.cache.num_free_pages // self.lanes * size - size
        count = min(count, MAX_LEN - longest, room)
        if count < 1:
            return
        new = np.random.default_rng(seed).standard_normal((count, 2, SHAPE.num_kv_heads, SHAPE.head_dim))
        new[:, 1] *= 0.5
        new = new.astype(np.float16)
        k, v = (self.cupy.asarray(np.ascontiguousarray(new[:, which])) for which in range(2))
        layer = (self.layer,) if self.lanes > 1 else ()
        if count == 1:
            self.cache.append(*layer, [row], k, v)
        else:
            self.cache.fill(*layer, row, k, v)
        for at, lane in enumerate(lanes):
            own = new[:, :, at : at + 1] if self.lanes > 1 else new
            self.tokens[lane] = np.concatenate([self.tokens[lane], own])

    def fork(self, source: int, row: int) -> None:
        self.cache.fork(source, row=row)
        for lane, new in zip(self.lanes_of(source), self.lanes_of(row)):
            self.tokens[new] = self.tokens[lane][: len(self.tokens[lane]) // SHAPE.page_size * SHAPE.page_size]

    def free(self, row: int) -> None:
        before = set(self.free_pages)
        self.cache.free(row)
        for lane in self.lanes_of(row):
            del self.tokens[lane]
        self.poison_pages(set(self.free_pages) - before)

    def evict(self, row: int, method: str, seed: int) -> None:
        """By a method's lists on random attention, a head apart where heads have pages of their own."""
        rng, kept = np.random.default_rng(seed), []
        for lane in self.lanes_of(row):
            length = len(self.tokens[lane])
            if not length:
                kept.append(np.zeros(0, np.int32))
                continue
            weights = rng.random((SHAPE.group_size, min(32, length), length)) ** 8
            seen = Seen(weights / weights.sum(-1, keepdims=True), rng.random((1, length)) + 0.1)
            kept += kept_pages(method, [seen], 1, BUDGET, page_size=SHAPE.page_size)[0]
        self.keep(row, kept)

    def keep(self, row: int, kept: list[np.ndarray]) -> None:
        if self.lanes > 1:
            gone = self.cache.evict(self.layer, row, kept)
        else:
            gone = self.cache.evict(row, kept[0])
        for lane, own in zip(self.lanes_of(row), kept):
            self.tokens[lane] = self.tokens[lane][self.tokens_at(lane, own)]
        self.poison_pages(gone)

    def tokens_at(self, lane: int, places: np.ndarray) -> np.ndarray:
        return tokens_of(np.asarray(places), len(self.tokens[lane]), SHAPE.page_size)

    def poison_pages(self, pages: object) -> None:
        pages = np.array(sorted(pages), np.int64)
        if len(pages):
            self.poison(self.cupy.asarray(pages))

    @property
    def free_pages(self) -> tuple[int, ...]:
        return (self.cache.pool if self.lanes > 1 else self.cache)._pages.free_pages

    def tables(self) -> tuple[object, object]:
        return self.cache.device_tables(self.layer) if self.lanes > 1 else self.cache.device_tables()

    def query(self, seed: int) -> np.ndarray:
        shape = ROWS * self.lanes, self.shape.num_q_heads, SHAPE.head_dim
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)

    def known(self) -> tuple[np.ndarray, ...]:
        """(k_pages, v_pages, table, lens) as the host knows them, lane after lane."""
        lanes, heads = ROWS * self.lanes, SHAPE.num_kv_heads // self.lanes
        lens = np.zeros(lanes, np.int32)
        padded = np.full((lanes, MAX_LEN, 2, heads, SHAPE.head_dim), np.nan)
        for lane, tokens in self.tokens.items():
            lens[lane], padded[lane, : len(tokens)] = len(tokens), tokens
        pages = padded.reshape(lanes * MAX_PAGES, SHAPE.page_size, 2, heads, SHAPE.head_dim).transpose(2, 0, 3, 1, 4)
        return *pages, np.arange(lanes * MAX_PAGES, dtype=np.int32).reshape(lanes, MAX_PAGES), lens

    def decode(self, seed: int) -> None:
        q = self.query(seed)
        self.engine.plan(*self.tables())
        out, lse = self.engine.run(self.cupy.asarray(q), self.cache.k_pages, self.cache.v_pages)
        self.compare(out, lse, reference.attention(self.shape, q.astype(np.float64), *self.known()))

    def select(self, seed: int, *, evict: int | None = None) -> None:
        """A step over the pages that the device selects; the row `evict` keeps these alone from then on."""
        q = self.query(seed)
        on_device, tables = self.cupy.asarray(q), self.tables()
        self.summaries.update(self.cache.k_pages, *tables)
        self.selector.plan(*tables)
        self.engine.plan(*tables)
        lists = self.selector.select(on_device, self.summaries)
        out, lse = self.engine.run(on_device, self.cache.k_pages, self.cache.v_pages, selected=lists)
        lists = PageList(*(array.get() for array in lists))
        self.compare(out, lse, reference.selected_attention(self.shape, q.astype(np.float64), *self.known(), lists))
        if evict is not None:
            self.keep(evict, [lists.pages[lane, 0, : lists.counts[lane, 0]] for lane in self.lanes_of(evict)])

    def compare(self, out: object, lse: object, want: tuple[np.ndarray, np.ndarray]) -> None:
        found, found_lse, live = out.get(), lse.get(), np.isfinite(want[1])
        assert (found[~live] == 0).all() and (found_lse[~live] == -np.inf).all()
        assert np.abs(found[live] - want[0][live]).max(initial=0) <= MAX_ERROR  # NaN fails too
        assert np.abs(found_lse[live] - want[1][live]).max(initial=0) <= 2e-3
