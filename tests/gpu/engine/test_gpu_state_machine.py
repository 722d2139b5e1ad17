"""A serving engine's use of the cache in any order: rows open, grow, end and are replaced, steps run and replay.

Pages that no row owns hold NaN, and results are compared with float64 attention over what the host knows was appended.
"""
from __future__ import annotations

import functools

import cupy
import numpy as np
from decode_ref import MAX_ERROR
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from gpu import CacheWriter, DecodeEngine, PagedKVCache
from gpu.measure.timing import capture, shared_stream
from pkvsim import AttentionOptions, DecodeShape, reference

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
ROWS, MAX_PAGES, MAX_NEW = 4, 10, 64
MAX_LEN = MAX_PAGES * SHAPE.page_size
WINDOWS = (None, 1, 40)
SCHEDULES = ("balanced", "workqueue")
SEEDS = st.integers(0, 2**32 - 1)


class Device:
    """Pool, arrays at fixed addresses, engines and captured steps; all examples use the same, one after the other."""

    def __init__(self) -> None:
        heads = SHAPE.num_q_heads, SHAPE.head_dim
        self.cache = PagedKVCache(SHAPE, num_pages=ROWS * MAX_PAGES, max_batch=ROWS, max_seq_len=MAX_LEN)
        self.writer = CacheWriter(SHAPE)
        self.engines = {(schedule, window): DecodeEngine(SHAPE, schedule=schedule,
                                                         options=AttentionOptions(window=window))
                        for schedule in SCHEDULES for window in WINDOWS}
        self.k_new, self.v_new = cupy.zeros((2, MAX_NEW, SHAPE.num_kv_heads, SHAPE.head_dim), dtype=cupy.float16)
        self.offsets = cupy.zeros(ROWS + 1, dtype=cupy.int32)
        self.q, self.out = cupy.zeros((2, ROWS, *heads), dtype=cupy.float16)
        self.lse = cupy.zeros((ROWS, SHAPE.num_q_heads), dtype=cupy.float32)
        self.graphs: dict[tuple[str, int | None], object] = {}
        cupy.cuda.get_current_stream().synchronize()

    def poison(self, pages: np.ndarray) -> None:
        for pool in (self.cache.k_pages, self.cache.v_pages):
            pool[cupy.asarray(pages)] = cupy.nan

    def put_tokens(self, tokens: np.ndarray) -> None:
        """tokens [num_tokens, 2, num_kv_heads, head_dim] float16, K and V."""
        for static, new in zip((self.k_new, self.v_new), tokens.swapaxes(0, 1)):
            static.fill(cupy.nan)
            static[:len(tokens)] = cupy.asarray(np.ascontiguousarray(new))

    def append(self, *, ragged: bool) -> None:
        """The tokens at offsets, or token i as row i's last."""
        lens, table = self.cache.device_tables()
        tokens = MAX_NEW if ragged else ROWS
        self.writer.append(self.k_new[:tokens], self.v_new[:tokens], self.cache.k_pages, self.cache.v_pages,
                           seq_lens=lens, block_table=table, token_offsets=self.offsets if ragged else None)

    def decode(self, schedule: str, window: int | None) -> None:
        engine = self.engines[schedule, window]
        engine.plan(*self.cache.device_tables())
        engine.run(self.q, self.cache.k_pages, self.cache.v_pages, out=self.out, lse=self.lse)

    def graph(self, kind: str, window: int | None) -> object:
        """The captured step: "decode", or "append" before it. The step's tables and tokens must be in place."""
        def body() -> None:
            if kind == "append":
                self.append(ragged=False)
            self.decode("balanced", window)

        if (kind, window) not in self.graphs:
            body()  # compiles, checks and allocates outside the capture; doing it twice changes nothing
            self.graphs[kind, window] = capture(body)
        return self.graphs[kind, window]


@functools.cache
def device() -> Device:
    return Device()


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.device = device()
        self.cache = self.device.cache
        self.tokens: dict[int, np.ndarray] = {}  # row: [length, 2, num_kv_heads, head_dim] float16, K and V
        with shared_stream():
            self.device.poison(np.arange(ROWS * MAX_PAGES))

    def teardown(self) -> None:
        for row in self.tokens:
            self.cache.free(row)

    def draw_tokens(self, counts: dict[int, int], seed: int) -> np.ndarray:
        """New tokens of the rows, one row after the other; the model has them from now on."""
        rng = np.random.default_rng(seed)
        new = rng.standard_normal((sum(counts.values()), 2, SHAPE.num_kv_heads, SHAPE.head_dim))
        new[:, 1] *= 0.5  # outputs stay where rounding them is far under the bound
        new, at = new.astype(np.float16), 0
        for row, count in counts.items():
            self.tokens[row] = np.concatenate([self.tokens[row], new[at:at + count]])
            at += count
        return new

    def put_query(self, seed: int) -> np.ndarray:
        q = np.random.default_rng(seed).standard_normal(self.device.q.shape).astype(np.float16)
        self.device.q[:] = cupy.asarray(q)
        for array in (self.device.out, self.device.lse):
            array.fill(cupy.nan)
        return q

    def expect(self, q: np.ndarray, window: int | None) -> None:
        """The outputs are float64 attention over the model's tokens."""
        lens = np.zeros(ROWS, np.int32)
        padded = np.full((ROWS, MAX_LEN, 2, SHAPE.num_kv_heads, SHAPE.head_dim), np.nan)
        for row, tokens in self.tokens.items():
            lens[row], padded[row, :len(tokens)] = len(tokens), tokens
        assert self.cache.seq_lens.tolist() == lens.tolist()
        pages = padded.reshape(ROWS * MAX_PAGES, SHAPE.page_size, 2, SHAPE.num_kv_heads, SHAPE.head_dim)
        table = np.arange(ROWS * MAX_PAGES, dtype=np.int32).reshape(ROWS, MAX_PAGES)
        out, lse = reference.attention(SHAPE, q.astype(np.float64), *pages.transpose(2, 0, 3, 1, 4), table, lens,
                                       options=AttentionOptions(window=window))
        found, found_lse = cupy.asnumpy(self.device.out), cupy.asnumpy(self.device.lse)
        live = lens > 0
        assert (found[~live] == 0).all() and (found_lse[~live] == -np.inf).all()
        assert np.abs(found[live] - out[live]).max(initial=0) <= MAX_ERROR["float16"]  # NaN fails too
        assert np.abs(found_lse[live] - lse[live]).max(initial=0) <= 2e-3

    @precondition(lambda self: len(self.tokens) < ROWS)
    @rule()
    def open(self) -> None:
        row = self.cache.allocate()
        self.tokens[row] = np.zeros((0, 2, SHAPE.num_kv_heads, SHAPE.head_dim), np.float16)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, ROWS - 1))
    def close(self, which: int) -> None:
        row = sorted(self.tokens)[which % len(self.tokens)]
        pages = self.cache.block_table[row]
        pages = pages[pages >= 0].copy()
        self.cache.free(row)
        del self.tokens[row]
        if len(pages):
            with shared_stream():
                self.device.poison(pages)

    @precondition(lambda self: self.tokens)
    @rule(counts=st.lists(st.integers(0, MAX_NEW // ROWS), min_size=ROWS, max_size=ROWS), seed=SEEDS)
    def grow(self, counts: list[int], seed: int) -> None:
        """Ragged new tokens, by the writer."""
        fitting = {row: min(counts[row], MAX_LEN - len(self.tokens[row])) for row in sorted(self.tokens)}
        self.cache.reserve(list(fitting), list(fitting.values()))
        tokens = self.draw_tokens(fitting, seed)
        offsets = np.cumsum([0, *(fitting.get(row, 0) for row in range(ROWS))], dtype=np.int32)
        with shared_stream():
            self.device.put_tokens(tokens)
            self.device.offsets[:] = cupy.asarray(offsets)
            self.device.append(ragged=True)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, ROWS - 1), count=st.integers(1, MAX_LEN), seed=SEEDS)
    def fill(self, which: int, count: int, seed: int) -> None:
        """A long run of one row's tokens, by the pool itself."""
        row = sorted(self.tokens)[which % len(self.tokens)]
        tokens = self.draw_tokens({row: min(count, MAX_LEN - len(self.tokens[row]))}, seed)
        with shared_stream():
            self.cache.fill(row, *(cupy.asarray(np.ascontiguousarray(new)) for new in tokens.swapaxes(0, 1)))

    @rule(schedule=st.sampled_from(SCHEDULES), window=st.sampled_from(WINDOWS), seed=SEEDS)
    def decode(self, schedule: str, window: int | None, seed: int) -> None:
        with shared_stream():
            q = self.put_query(seed)
            self.device.decode(schedule, window)
        self.expect(q, window)

    @rule(window=st.sampled_from(WINDOWS), replays=st.integers(1, 3), seed=SEEDS)
    def replay(self, window: int | None, replays: int, seed: int) -> None:
        """The same captured decode again and again; results repeat bit for bit."""
        results = []
        with shared_stream():
            self.cache.device_tables()
            graph = self.device.graph("decode", window)
            for _ in range(replays):
                q = self.put_query(seed)
                graph.replay()
                results.append((self.device.out.copy(), self.device.lse.copy()))
        self.expect(q, window)
        for out, lse in results:
            assert bool((out == results[0][0]).all()) and bool((lse == results[0][1]).all())

    @precondition(lambda self: self.tokens and all(len(tokens) < MAX_LEN for tokens in self.tokens.values()))
    @rule(window=st.sampled_from(WINDOWS), seed=SEEDS)
    def step(self, window: int | None, seed: int) -> None:
        """A token for every row, appended and attended in one captured graph."""
        rows = sorted(self.tokens)
        self.cache.reserve(rows, [1] * len(rows))
        by_row = np.full((ROWS, 2, SHAPE.num_kv_heads, SHAPE.head_dim), np.nan, np.float16)
        by_row[rows] = self.draw_tokens(dict.fromkeys(rows, 1), seed)
        with shared_stream():
            self.device.put_tokens(by_row)
            self.cache.device_tables()
            graph = self.device.graph("append", window)
            q = self.put_query(seed)
            graph.replay()
        self.expect(q, window)


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None,
                                     suppress_health_check=[HealthCheck.too_slow])
