"""A serving engine's rows that fork from each other's full pages, in any order: groups form, grow, split and end.

Pages that no row owns hold NaN, and results are compared with float64 attention over what the host knows was written.
"""
from __future__ import annotations

import functools

import cupy
import numpy as np
from decode_ref import MAX_ERROR
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gpu import DecodeEngine, PrefixGroups
from gpu.measure.timing import capture, shared_stream
from pkvsim import DecodeShape, reference
from pkvsim.schedule.prefixes import SharingRule, find_prefixes

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
ROWS, MAX_PAGES, POOL_PAGES, MAX_NEW = 7, 12, 60, 80
MAX_LEN = MAX_PAGES * SHAPE.page_size
ALL = SharingRule(0, 0)  # shares whatever can be
WAYS = ("told", "auto", "plain")
SEEDS = st.integers(0, 2**32 - 1)
WHICH = st.integers(0, ROWS - 1)


class Device:
    """Pool, arrays at fixed addresses, engines and captured steps; all examples use the same, one after the other."""

    def __init__(self) -> None:
        pages = POOL_PAGES, SHAPE.num_kv_heads, SHAPE.page_size, SHAPE.head_dim
        self.pools = [cupy.zeros(pages, dtype=cupy.float16) for _ in range(2)]
        self.table = cupy.zeros((ROWS, MAX_PAGES), dtype=cupy.int32)
        self.lens, self.group_of_row, self.prefix_pages = (cupy.zeros(ROWS, dtype=cupy.int32) for _ in range(3))
        self.q, self.out = cupy.zeros((2, ROWS, SHAPE.num_q_heads, SHAPE.head_dim), dtype=cupy.float16)
        self.lse = cupy.zeros((ROWS, SHAPE.num_q_heads), dtype=cupy.float32)
        self.engines = {way: DecodeEngine(SHAPE, sharing_rule=ALL) for way in WAYS}
        self.graphs: dict[str, object] = {}
        cupy.cuda.get_current_stream().synchronize()

    def decode(self, way: str) -> None:
        groups = {"told": PrefixGroups(self.group_of_row, self.prefix_pages), "auto": "auto", "plain": None}[way]
        engine = self.engines[way]
        engine.plan(self.lens, self.table, groups=groups)
        engine.run(self.q, *self.pools, out=self.out, lse=self.lse)

    def graph(self, way: str) -> object:
        if way not in self.graphs:
            self.decode(way)  # compiles outside the capture
            self.graphs[way] = capture(lambda: self.decode(way))
        return self.graphs[way]


device = functools.cache(Device)  # of all examples


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.device = device()
        self.free = list(range(POOL_PAGES))
        self.owners = np.zeros(POOL_PAGES, np.int64)  # rows that have each page
        self.pages: dict[int, list[int]] = {}
        self.tokens: dict[int, np.ndarray] = {}  # row: [length, 2, num_kv_heads, head_dim] float16, K and V
        with shared_stream():
            for pool in self.device.pools:
                pool.fill(cupy.nan)

    def put_step(self, told: np.random.Generator) -> None:
        """Tables, lengths and groups: those that Python finds, of which some rows may stay away."""
        table, lens = np.full((ROWS, MAX_PAGES), -1, np.int32), np.zeros(ROWS, np.int32)
        for row, pages in self.pages.items():
            table[row, :len(pages)], lens[row] = pages, len(self.tokens[row])
        groups = find_prefixes(np.maximum(table, 0), lens, page_size=SHAPE.page_size, rule=ALL)
        of_row = np.where(told.random(ROWS) < 0.2, -1, groups.group_of_row).astype(np.int32)
        prefixes = np.zeros(ROWS, np.int32)
        prefixes[:len(groups.prefix_pages)] = groups.prefix_pages
        for array, host in ((self.device.table, table), (self.device.lens, lens), (self.device.group_of_row, of_row),
                            (self.device.prefix_pages, prefixes)):
            array[:] = cupy.asarray(host)

    def put_query(self, rng: np.random.Generator) -> np.ndarray:
        q = rng.standard_normal(self.device.q.shape).astype(np.float16)
        self.device.q[:] = cupy.asarray(q)
        for array in (self.device.out, self.device.lse):
            array.fill(cupy.nan)
        return q

    def expect(self, q: np.ndarray) -> None:
        lens = np.zeros(ROWS, np.int32)
        padded = np.full((ROWS, MAX_LEN, 2, SHAPE.num_kv_heads, SHAPE.head_dim), np.nan)
        for row, tokens in self.tokens.items():
            lens[row], padded[row, :len(tokens)] = len(tokens), tokens
        pages = padded.reshape(ROWS * MAX_PAGES, SHAPE.page_size, 2, SHAPE.num_kv_heads, SHAPE.head_dim)
        table = np.arange(ROWS * MAX_PAGES, dtype=np.int32).reshape(ROWS, MAX_PAGES)
        out, lse = reference.attention(SHAPE, q.astype(np.float64), *pages.transpose(2, 0, 3, 1, 4), table, lens)
        found, found_lse = cupy.asnumpy(self.device.out), cupy.asnumpy(self.device.lse)
        live = lens > 0
        assert (found[~live] == 0).all() and (found_lse[~live] == -np.inf).all()
        assert np.abs(found[live] - out[live]).max(initial=0) <= MAX_ERROR["float16"]  # NaN fails too
        assert np.abs(found_lse[live] - lse[live]).max(initial=0) <= 2e-3

    def open_row(self, pages: list[int], tokens: np.ndarray) -> None:
        row = min(set(range(ROWS)) - set(self.pages))
        self.pages[row], self.tokens[row] = list(pages), tokens
        self.owners[pages] += 1

    @initialize(counts=st.lists(st.integers(0, MAX_NEW), min_size=2, max_size=2), times=st.integers(0, 2), seed=SEEDS)
    def begin(self, counts: list[int], times: int, seed: int) -> None:
        """Two rows, from whose pages others begin."""
        for which, count in enumerate(counts):
            self.open()
            self.grow(which, count + 1, seed + which)
            self.fork(which, 1.0, times)

    @precondition(lambda self: len(self.pages) < ROWS)
    @rule()
    def open(self) -> None:
        self.open_row([], np.zeros((0, 2, SHAPE.num_kv_heads, SHAPE.head_dim), np.float16))

    @precondition(lambda self: self.pages and len(self.pages) < ROWS)
    @rule(which=WHICH, share=st.sampled_from([1.0, 1.0, 0.5]), times=st.integers(1, 3))
    def fork(self, which: int, share: float, times: int) -> None:
        """Rows that begin with a share of another's full pages."""
        row = sorted(self.pages)[which % len(self.pages)]
        count = round(share * (len(self.tokens[row]) // SHAPE.page_size))
        for _ in range(min(times, ROWS - len(self.pages))):
            self.open_row(self.pages[row][:count], self.tokens[row][:count * SHAPE.page_size])

    @precondition(lambda self: len(self.pages) > 2)
    @rule(which=WHICH)
    def close(self, which: int) -> None:
        row = sorted(self.pages)[which % len(self.pages)]
        pages = self.pages.pop(row)
        del self.tokens[row]
        self.owners[pages] -= 1
        unowned = [page for page in pages if self.owners[page] == 0]
        self.free += unowned
        if unowned:
            with shared_stream():
                for pool in self.device.pools:
                    pool[cupy.asarray(unowned)] = cupy.nan

    @precondition(lambda self: self.pages)
    @rule(which=WHICH, count=st.integers(1, MAX_NEW), seed=SEEDS)
    def grow(self, which: int, count: int, seed: int) -> None:
        row = sorted(self.pages)[which % len(self.pages)]
        pages, old = self.pages[row], len(self.tokens[row])
        room = (len(pages) + len(self.free)) * SHAPE.page_size
        end = min(old + count, MAX_LEN, room)
        while len(pages) * SHAPE.page_size < end:
            pages.append(self.free.pop())
            self.owners[pages[-1]] = 1
        new = np.random.default_rng(seed).standard_normal((end - old, 2, SHAPE.num_kv_heads, SHAPE.head_dim))
        new[:, 1] *= 0.5  # outputs stay where rounding them is far under the bound
        new = new.astype(np.float16)
        self.tokens[row] = np.concatenate([self.tokens[row], new])
        places = np.arange(old, end)
        ids, slots = np.array(pages, np.int64)[places // SHAPE.page_size], places % SHAPE.page_size
        with shared_stream():
            for pool, tokens in zip(self.device.pools, new.swapaxes(0, 1)):
                pool[cupy.asarray(ids), :, cupy.asarray(slots)] = cupy.asarray(np.ascontiguousarray(tokens))

    @rule(way=st.sampled_from(WAYS), seed=SEEDS)
    def decode(self, way: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        with shared_stream():
            self.put_step(rng)
            q = self.put_query(rng)
            self.device.decode(way)
        self.expect(q)

    @rule(way=st.sampled_from(WAYS), replays=st.integers(1, 3), seed=SEEDS)
    def replay(self, way: str, replays: int, seed: int) -> None:
        """The same captured step again and again; results repeat bit for bit."""
        results = []
        with shared_stream():
            self.put_step(np.random.default_rng(seed))
            graph = self.device.graph(way)
            for _ in range(replays):
                q = self.put_query(np.random.default_rng(seed))
                graph.replay()
                results.append((self.device.out.copy(), self.device.lse.copy()))
        self.expect(q)
        for out, lse in results:
            assert bool((out == results[0][0]).all()) and bool((lse == results[0][1]).all())


TestGroupsMachine = Machine.TestCase
TestGroupsMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
