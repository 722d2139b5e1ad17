"""Answers the serving loop: which blocks of a prompt are loaded, and when they are there.

Each block is in HBM, on a tier, or nowhere. What HBM holds of the prompt's start is read there; of the blocks that
follow, as many as TierSetup.load says are loaded from the devices, all of which read at once, and the rest is computed.
Prompts are stored as they have been computed, whole blocks alone, and can be read once they are written.
"""
from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pkvsim.memory.device_clock import DeviceClock
from pkvsim.memory.load_or_recompute import Choice, choose_prefix, in_layers
from pkvsim.memory.memory_pool import PoolCounts, Read, Write
from pkvsim.memory.prefix_cache import PromptBlocks
from pkvsim.memory.retention import GAPS_KEPT, choose_ttl_s
from pkvsim.memory.tier_options import ALWAYS_COMPUTE, ALWAYS_LOAD, TierSetup
from pkvsim.serving.state import SchedulerState

PromptPrices = Callable[[np.ndarray, int], np.ndarray]  # (begins [k] int64, end) -> us to compute the rest [k]


class TierWork(NamedTuple):
    """A device's work for one request: blocks read, or written."""

    request: int
    tier: int
    begin_s: float
    end_s: float
    num_bytes: int
    is_write: bool


class Hold(NamedTuple):
    """A prompt's blocks that the next turn of its session will ask for, to be kept until then."""

    keys: list[int]
    until_s: float


class TierLog(NamedTuple):
    """What the tiers did for n requests on t devices; loads of a preempted request's later admissions are added up."""

    hit_blocks: np.ndarray  # [n] int64, leading blocks behind those of HBM that could be loaded, at first admission
    tokens: np.ndarray  # [n, t] int64, loaded
    blocked_s: np.ndarray  # [n, t] float64, from asking until the device had delivered its part
    load_s: np.ndarray  # [n] float64, from first admission until all was there, behind the link
    exposed_s: np.ndarray  # [n] float64, the part of it in which nothing of the prompt could be computed
    work: list[TierWork]  # in the order of asking
    counts: PoolCounts


class TierServer:
    """The pool and the devices behind one simulated server."""

    def __init__(
        self, setup: TierSetup, blocks: PromptBlocks, prompt_tokens: np.ndarray, *, block_tokens: int,
        block_bytes: int, link_bytes_per_s: float, num_layers: int, prices: PromptPrices,
        sessions: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """blocks: of every prompt, the last one partly filled; block_tokens: of a whole one; block_bytes: in all
        layers of all the model's GPUs. sessions: [n] int, of which requests are turns, -1 none; not asked for without
        setup.hold_cost. Raises ValueError naming the argument."""
        self.setup, self._blocks, self._prices = setup, blocks, prices
        self._block_tokens, self._block_bytes = block_tokens, block_bytes
        self._whole = prompt_tokens // block_tokens  # [n], whole blocks of each prompt
        self._next_use: dict[int, float] = {}
        self._options = setup.options(link_bytes_per_s=link_bytes_per_s, num_layers=num_layers)
        self._pool = self._options.make_pool(
            setup.tiers, block_bytes=block_bytes, next_use=lambda key: self._next_use.get(key, np.inf)  # type: ignore
        )
        self._clock = DeviceClock(setup.tiers, link_bytes_per_s=link_bytes_per_s, serial=setup.serial)
        self._computing: list[int] = []  # requests whose prompts are to be stored
        self._asked = np.zeros(len(prompt_tokens), bool)
        self._busy: list[tuple[float, int, tuple[Read, ...] | Write | Hold]] = []  # a heap by their ends
        self._sessions = None if setup.hold_cost is None else sessions
        self._stored_s: dict[int, float] = {}  # of each session, when its last prompt was computed
        self._gaps: list[float] = []  # from there to the next turn
        self._began = 0
        n, t = len(prompt_tokens), len(setup.tiers)
        self.log = TierLog(
            np.zeros(n, np.int64), np.zeros((n, t), np.int64), np.zeros((n, t)), np.zeros(n), np.zeros(n), [],
            self._pool.counts,
        )  # fmt: skip

    def answer(self, state: SchedulerState) -> bool:
        """Answers the request that asks, as of when it does; False where none does."""
        request, now_us = int(state.gate.asking[0]), float(state.gate.asked_us[0])
        if request < 0:
            return False
        state.gate.asking[0] = -1
        now_s = now_us / 1e6
        self._catch_up(state, now_s)
        keys = self._keys(request)
        resident = int(state.cached[request])
        tail = keys[resident // self._block_tokens :]
        hits = self._pool.ready_prefix(tail)
        end = int(state.target[request])
        begins = np.minimum(resident // self._block_tokens + np.arange(hits + 1), self._whole[request])
        begins = np.minimum(np.maximum(begins * self._block_tokens, resident), end - 1)
        choice, layers = self._choose(tail[:hits], begins, end, now_s)
        reads = self._pool.want(tail, limit=choice.blocks)
        counts = np.bincount([read.place.tier for read in reads], minlength=len(self.setup.tiers))
        loaded = self._clock.read(counts * self._block_bytes, now_s)
        load_s = loaded.end_s - now_s
        # Where layers arrive one by one the prompt is computed while they do, and nothing but the first is waited for.
        exposed_s = max(load_s / layers, load_s - choice.compute_s * (1 - 1 / layers))
        state.cached[request] = begins[choice.blocks]
        state.gate.ready_us[request] = now_us + exposed_s * 1e6
        self._note(request, counts, loaded.begins_s, loaded.ends_s, now_s, load_s, exposed_s)
        if reads:
            self._begin(loaded.end_s, reads)
        self._pool.touch(keys)
        if not self._asked[request]:
            self._asked[request] = True
            self._computing.append(request)
            self.log.hit_blocks[request] = hits
            if self._sessions is not None and int(self._sessions[request]) in self._stored_s:
                self._gaps.append(now_s - self._stored_s.pop(int(self._sessions[request])))
        return True

    def finish(self, state: SchedulerState) -> TierLog:
        """Stores what was computed last, and returns the log of the whole run."""
        self._catch_up(state, np.inf)
        return self.log

    def _keys(self, request: int) -> list[int]:
        begin = int(self._blocks.offsets[request])
        at = slice(begin, begin + int(self._whole[request]))
        keys = self._blocks.ids[at].tolist()
        self._next_use.update(zip(keys, self._blocks.next_request[at].tolist()))
        return keys

    def _choose(self, tail: list[int], begins: np.ndarray, end: int, now_s: float) -> tuple[Choice, int]:
        """(how many of these blocks to load, layers that arrive one by one)."""
        if not tail or self.setup.load == ALWAYS_COMPUTE:
            return Choice(0, 0.0, float(self._prices(begins[:1], end)[0]) / 1e6, 0.0), 1
        places = self._pool.places(tail)
        layers = self._options.num_layers if in_layers(self.setup.tiers, places) else 1
        times = self._clock.load_times_s(places, self._block_bytes, now_s)
        compute_s = self._prices(begins, end) / 1e6
        if self.setup.load == ALWAYS_LOAD:
            return Choice(len(tail), float(times[-1]), float(compute_s[-1]), float(times[-1])), layers
        choice = choose_prefix(times, lambda loaded: compute_s[loaded], num_layers=layers)
        return choice, self._options.num_layers if in_layers(self.setup.tiers, places[: choice.blocks]) else 1

    def _note(
        self, request: int, counts: np.ndarray, begins_s: np.ndarray, ends_s: np.ndarray, now_s: float, load_s: float,
        exposed_s: float,
    ) -> None:  # fmt: skip
        log = self.log
        log.tokens[request] += counts * self._block_tokens
        log.blocked_s[request] += np.where(counts > 0, ends_s - now_s, 0.0)
        log.load_s[request] += load_s
        log.exposed_s[request] += exposed_s
        for tier in np.flatnonzero(counts).tolist():
            num_bytes = int(counts[tier]) * self._block_bytes
            log.work.append(TierWork(request, tier, float(begins_s[tier]), float(ends_s[tier]), num_bytes, False))

    def _begin(self, end_s: float, what: tuple[Read, ...] | Write | Hold) -> None:
        self._began += 1
        heapq.heappush(self._busy, (end_s, self._began, what))

    def _catch_up(self, state: SchedulerState, now_s: float) -> None:
        """Stores prompts computed until now, and ends the reads and writes that are over by then."""
        waiting, computed = [], []
        for request in self._computing:
            at_s = float(state.first_token_us[request]) / 1e6
            if at_s <= now_s:
                computed.append((at_s, request))
            else:  # NaN: not yet
                waiting.append(request)
        self._computing = waiting
        for at_s, request in sorted(computed):
            self._end_until(at_s)
            self._store(request, at_s)
        self._end_until(now_s)

    def _store(self, request: int, at_s: float) -> None:
        spans: dict[int, list[float]] = {}
        keys = self._keys(request)
        for write in self._pool.store(keys):
            begin_s, end_s = self._clock.write(write.place.tier, self._block_bytes, at_s)
            self._begin(end_s, write)
            span = spans.setdefault(write.place.tier, [begin_s, end_s, 0])
            span[1], span[2] = end_s, span[2] + self._block_bytes
        self.log.work.extend(
            TierWork(request, tier, begin_s, end_s, int(num_bytes), True)
            for tier, (begin_s, end_s, num_bytes) in spans.items()
        )
        if self._sessions is not None and self._sessions[request] >= 0 and keys:
            self._stored_s[int(self._sessions[request])] = at_s
            until_s = at_s + self._ttl_s(len(keys) * self._block_tokens)
            written_s = max([at_s, *(end_s for _, end_s, _ in spans.values())])
            if until_s > written_s:  # blocks can be held from when they are there
                self._begin(written_s, Hold(keys, until_s))

    def _ttl_s(self, tokens: int) -> float:
        """For how long a prompt of so many tokens is kept, by what its next turn need not compute."""
        none_us, all_us = self._prices(np.array([0, tokens]), tokens + 1)
        return choose_ttl_s(
            self._gaps[-GAPS_KEPT:], benefit_s=float(none_us - all_us) / 1e6, cost_s_per_s=self.setup.hold_cost or 0.0
        )

    def _end_until(self, at_s: float) -> None:
        while self._busy and self._busy[0][0] <= at_s:
            what = heapq.heappop(self._busy)[2]
            if isinstance(what, Write):
                self._pool.stored(what)
            elif isinstance(what, Hold):
                self._pool.hold(what.keys, what.until_s)
            else:
                self._pool.done_all(what)
        self._pool.expire(at_s)
