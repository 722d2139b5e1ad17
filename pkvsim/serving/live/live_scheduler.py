"""The scheduler of requests that come while others run, and end at any time.

    scheduler = LiveScheduler(limits)
    scheduler.add(key, prompt=token_ids, output_tokens=64, now_us=now)
    while scheduler.has_work:
        step = scheduler.next_step(now_us)       # run step.decode and the chunks of step.prefill
        scheduler.end_step(now_us)               # its tokens are out
        scheduler.cancel(key, now_us)            # at any time between steps

It is pkvsim.serving.scheduling over arrays that grow: requests that have ended leave them when they are full, so that
memory follows the requests at hand and not those ever seen.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.memory.blocks.block_keys import block_keys
from pkvsim.memory.prefix_cache import (
    EVICTABLE_PAGES,
    EVICTED,
    FREE_PAGES,
    FREED,
    NONE,
)
from pkvsim.serving.live.block_numbers import BlockNumbers
from pkvsim.serving.live.growing import Room, empty_state, moved, no_requests, room_for
from pkvsim.serving.live.live_step import LiveStep, PromptLoads, check_served
from pkvsim.serving.live.page_book import NewPages, PageBook
from pkvsim.serving.live.shared_blocks import computed_tokens, first_shared
from pkvsim.serving.orders import SHORTEST
from pkvsim.serving.queueing.giving_way import cancel
from pkvsim.serving.scheduling import end_step, plan_step, take_in
from pkvsim.serving.state import (
    FINISHED,
    FIRST_ADMITTED,
    IN_FLIGHT,
    JUST_PREEMPTED,
    NUM_CHUNKS,
    NUM_DECODING,
    NUM_RUNNING,
    NUM_SENT,
    NUM_WAITING,
    Limits,
    SchedulerState,
)


class LiveScheduler:
    """Continuous batching of requests named by keys, integers of the caller's that it uses once.

    pages: which page of the pool holds what. state: the scheduler's, by places that change; to be read alone.
    """

    __slots__ = ("limits", "pages", "requests", "state", "_places", "_keys", "_used", "_numbers",
                 "_planned", "_dropped_at", "_loads", "_untold", "_found", "_blocks")

    def __init__(self, limits: Limits, loads: PromptLoads | None = None) -> None:
        """loads: from tiers beyond the pages, where there are any. ValueError as check_served."""
        check_served(limits)
        limits = limits._replace(tiers=loads is not None)
        self.limits, self.pages = limits, PageBook(limits.num_pages)
        self._loads = loads
        self._untold: dict[int, NewPages] = {}  # of admitted requests that have run no chunk
        self._found: dict[int, int] = {}  # tokens that were in pages when they were admitted, of those that wait
        self._places: dict[int, int] = {}  # by key, of requests that have not ended
        self._used = 0
        self._numbers = BlockNumbers()
        self._blocks: dict[int, list[bytes]] = {}  # by key, of requests that have not ended
        self._planned, self._dropped_at = False, (0, 0)
        room = room_for(1, 0, 0)
        self.requests = no_requests(limits.page_size, room)
        self.state: SchedulerState = empty_state(self.requests, limits)
        self._keys = np.zeros(room.requests, np.int64)

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.state.counts[NUM_RUNNING] or self.state.counts[NUM_WAITING])

    @property
    def num_running(self) -> int:
        return int(self.state.counts[NUM_RUNNING])

    @property
    def num_waiting(self) -> int:
        return int(self.state.counts[NUM_WAITING])

    @property
    def num_used_pages(self) -> int:
        """Pages of running requests; blocks that the prefix cache merely keeps are as good as free."""
        counts = self.state.pool.counts
        return self.limits.num_pages - int(counts[FREE_PAGES]) - int(counts[EVICTABLE_PAGES])

    @property
    def untold(self) -> list[int]:
        """Keys of requests that have their pages and have run no chunk, as they wait for loads."""
        return list(self._untold)

    def holds(self, key: int) -> bool:
        """Whether a request of that key has not ended."""
        return key in self._places

    def blocks_of(self, key: int) -> list[bytes]:
        """Keys of the blocks of a request's prompt, of all whole ones where loads ask for them; until it has ended."""
        return self._blocks[key]

    def pages_needed(self, prompt_tokens: int, output_tokens: int) -> int:
        """Pages that a request has at its end; the last token is never cached."""
        page_size, shared = self.limits.page_size, self._shared_tokens(prompt_tokens)
        return -(-(prompt_tokens + output_tokens - 1 - shared) // page_size) + shared // page_size

    def _shared_tokens(self, prompt_tokens: int) -> int:
        """Tokens of a prompt that others may find: whole pages, and not the last token, which is computed always."""
        page_size = self.limits.page_size
        return 0 if self.limits.cache_kind == NONE else (prompt_tokens - 1) // page_size * page_size

    def add(self, key: int, *, prompt: np.ndarray, output_tokens: int, now_us: float) -> None:
        """A request is there: it gives output_tokens tokens to its prompt [tokens] int32. ValueError where it can never
        run, or its key is in use."""
        if key in self._places:
            raise ValueError(f"key: expected one that is not in use, got {key}")
        needed = self.pages_needed(len(prompt), output_tokens)
        if len(prompt) < 1 or output_tokens < 1 or needed > self.limits.num_pages:
            raise ValueError(
                f"prompt: expected a prompt and an output of a token or more, in {self.limits.num_pages} pages of "
                f"{self.limits.page_size}, got {len(prompt)} and {output_tokens}, which take {needed}"
            )
        shared = self._shared_tokens(len(prompt))
        hashed = shared if self._loads is None else len(prompt)
        self._blocks[key] = blocks = block_keys(prompt[:hashed], self.limits.page_size)
        blocks = blocks[: shared // self.limits.page_size]
        self._make_room(len(blocks))
        place, requests, state = self._used, self.requests, self.state
        self._used += 1
        begin = requests.blocks.offsets[place]
        requests.blocks.ids[begin : begin + len(blocks)] = self._numbers.numbers_of(blocks)
        requests.blocks.offsets[place + 1 :] = begin + len(blocks)
        requests.prompt[place], requests.output[place] = len(prompt), output_tokens
        requests.shared[place] = shared
        state.rank[place] = output_tokens if self.limits.order == SHORTEST else 0.0
        clients = state.clients
        clients.sent_us[place], clients.place[place] = now_us, clients.counts[NUM_SENT]
        clients.counts[NUM_SENT] += 1
        clients.counts[IN_FLIGHT] += 1
        self._places[key], self._keys[place] = place, key
        take_in(state, place)

    def next_step(self, now_us: float) -> LiveStep:
        """Plans a step of what there is at now_us. RuntimeError where the step before has not ended, or has_work is
        False."""
        if self._planned or not self.has_work:
            raise RuntimeError("next_step: " + ("call end_step() first" if self._planned else "nothing runs or waits"))
        state = self.state
        self._take_arrived()
        plan_step(self.requests, self.limits, state, float(now_us))
        while self._ask_for_load():  # as of the same time: nothing has been run by then
            plan_step(self.requests, self.limits, state, float(now_us))
        self._planned = True
        counts = state.counts.tolist()
        decode = state.decoding[: counts[NUM_DECODING]].copy()
        chunks = slice(counts[NUM_CHUNKS])
        prefill = state.chunk_request[chunks].copy()
        begins, tokens = state.chunk_begin[chunks].copy(), state.chunk_tokens[chunks].copy()
        preempted = self._keys[state.preempted[: counts[JUST_PREEMPTED]]]
        if self._loads is None:
            admitted = prefill[counts[FIRST_ADMITTED] :]
        else:
            told = [place for place in prefill.tolist() if int(self._keys[place]) in self._untold]
            admitted = np.array(told, np.int64)
        return LiveStep(
            decode=self._keys[decode],
            decode_lens=state.cached[decode] + 1,
            prefill=self._keys[prefill],
            prefill_begins=begins,
            prefill_tokens=tokens,
            ends=begins + tokens == state.target[prefill],
            admitted=self._keys[admitted],
            preempted=preempted,
            new_pages=self._number_pages(decode, admitted, preempted),
        )

    def _take_arrived(self) -> None:
        for key, cached in () if self._loads is None else self._loads.arrived():
            if cached is None:
                self._begin_load(self._places[key], self.pages.pages(key))
            else:
                self._set_cached(self._places[key], cached)

    def _set_cached(self, place: int, cached: int) -> None:
        """What a request has loaded is there."""
        self.state.cached[place], self.state.gate.ready_us[place] = cached, -math.inf
        del self._found[int(self._keys[place])]

    def _ask_for_load(self) -> bool:
        """Gives the request that was just admitted its pages and has what tiers hold of it loaded; False where none
        was."""
        state = self.state
        place = int(state.gate.asking[0])
        if place < 0:
            return False
        state.gate.asking[0] = -1
        self._drop_blocks()
        self._untold[int(self._keys[place])] = new = self._open(place)
        self._begin_load(place, new.page_ids)
        return True

    def _begin_load(self, place: int, pages: list[int]) -> None:
        state, loads, key = self.state, self._loads, int(self._keys[place])
        assert loads is not None  # or nobody asks
        found = self._found.setdefault(key, int(state.cached[place]))
        cached = min(found, computed_tokens(self.requests, state, place, self.limits.page_size))
        state.cached[place] = cached
        own = first_shared(self.requests, state, place, cached // self.limits.page_size, len(pages))
        there = loads.begin(key, blocks=self._blocks[key], cached=cached, target=int(state.target[place]),
                            pages=pages, own=own)
        if there is not None:
            self._set_cached(place, there)

    def _open(self, place: int) -> NewPages:
        blocks = self.requests.blocks
        own = blocks.ids[blocks.offsets[place] : blocks.offsets[place + 1]].astype(np.int64)
        return self.pages.open(int(self._keys[place]), own, int(self.state.private_pages[place]))

    def _close(self, key: int) -> None:
        """A request that ran has no pages any more."""
        if self._loads is not None:
            self._loads.cancel(key)
            self._untold.pop(key, None)
            self._found.pop(key, None)
            for other in self._found:  # which it may have left with blocks that it has not computed
                self._found[other] = int(self.state.cached[self._places[other]])
        self.pages.close(key)

    def _number_pages(self, decode: np.ndarray, admitted: np.ndarray, preempted: np.ndarray) -> list[NewPages]:
        """Has the page book follow the planned step. decode, admitted: by their places; preempted: by keys."""
        state = self.state
        for key in preempted.tolist():
            self._close(key)
        self._drop_blocks()
        # A row takes a page beside the prompt's when its last one is full, as private_pages_of counts them.
        beyond = state.cached[decode] - self.requests.shared[decode]
        grown = decode[beyond % self.limits.page_size == 0]
        new = [self.pages.extend(int(self._keys[place]), int(state.private_pages[place])) for place in grown.tolist()]
        for place in admitted.tolist():
            new.append(self._open(place) if self._loads is None else self._untold.pop(int(self._keys[place])))
        return new

    def _drop_blocks(self) -> None:
        pool = self.state.pool
        at = int(pool.counts[EVICTED]), int(pool.counts[FREED])
        if at != self._dropped_at:
            self.pages.drop_blocks(pool.users)
            self._dropped_at = at

    def end_step(self, now_us: float) -> np.ndarray:
        """Ends the planned step at now_us; the keys of the requests that finished with it, int64 [k]. RuntimeError
        where no step is planned."""
        if not self._planned:
            raise RuntimeError("end_step: call next_step() first")
        before = self.state.running[: self.state.counts[NUM_RUNNING]].copy()
        end_step(self.requests, self.limits, self.state, float(now_us))
        self._planned = False
        finished = self._keys[before[self.state.phase[before] == FINISHED]]
        for key in finished.tolist():
            del self._places[key], self._blocks[key]
            self.pages.close(key)
        self._drop_blocks()
        return finished

    def cancel(self, key: int, now_us: float) -> None:
        """Ends a request that has not finished; its pages are free. RuntimeError between next_step and end_step."""
        if self._planned:
            raise RuntimeError("cancel: call end_step() first")
        place, runs = self._places[key], self._runs(self._places[key])
        del self._places[key], self._blocks[key]
        cancel(self.requests, self.limits, self.state, place, float(now_us))
        if runs:
            self._close(key)
            self._drop_blocks()

    def _runs(self, place: int) -> bool:
        return place in self.state.running[: self.state.counts[NUM_RUNNING]]

    def _make_room(self, blocks: int) -> None:
        """Makes sure that one more request fits, with so many blocks."""
        requests, offset = self.requests, int(self.requests.blocks.offsets[self._used])
        full = self._used == len(requests.prompt) or offset + blocks > len(requests.blocks.ids)
        if not full and len(self._numbers) + blocks <= len(requests.blocks.tokens):
            return
        live = np.array(sorted(self._places.values()), np.int64)
        lengths = np.diff(requests.blocks.offsets)[live]
        used = np.zeros(len(requests.blocks.tokens), bool)
        used[: len(self._numbers)] = self.state.pool.users[: len(self._numbers)] >= 0
        for place in live.tolist():
            used[requests.blocks.ids[requests.blocks.offsets[place] : requests.blocks.offsets[place + 1]]] = True
        kept = np.flatnonzero(used)
        self._move(live, kept, room_for(len(live) + 1, int(lengths.sum()) + blocks, len(kept) + blocks))

    def _move(self, live: np.ndarray, kept: np.ndarray, room: Room) -> None:
        """Moves the requests `live` and the blocks `kept` to the beginning of new arrays."""
        self.requests, self.state = moved(self.requests, self.state, self.limits, live, kept, room)
        keys = np.zeros(room.requests, np.int64)
        keys[: len(live)] = self._keys[live]
        self._keys, self._used = keys, len(live)
        self._places = {key: place for place, key in enumerate(keys[: len(live)].tolist())}
        self._numbers.keep(kept.tolist())
        self.pages.renumber_blocks(kept, room.blocks)
