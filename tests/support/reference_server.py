"""A plain-Python server loop over pkvsim.outside: what an engine profile means, request by request, as a check of the
compiled one."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pkvsim.outside.engine_profile import EngineProfile
from pkvsim.outside.step_costs import PARTS, StepCosts, heated, step_parts


@dataclass
class Step:
    """What runs: requests that decode, chunks (request, begin, tokens), and who gets a token."""

    decode: list[int] = field(default_factory=list)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    tokens_of: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


class ReferenceServer:
    """First come, first served; prompts in chunks; the latest gives way where no page is free. Under steps_in_flight 2
    a step is planned when the one before it starts, so that plans run ahead of what has ended by one step."""

    def __init__(self, requests, costs: StepCosts, profile: EngineProfile, *, num_pages: int, step_tokens: int = 2048,
                 max_batch: int = 256, page_size: int = 16) -> None:
        """requests: (arrival in s, prompt tokens, output tokens), by arrival."""
        self.requests, self.costs, self.profile = requests, costs, profile
        self.arrivals = [arrival * 1e6 + profile.queue_ms * 1e3 for arrival, _, _ in requests]
        self.free, self.step_tokens, self.max_batch, self.page_size = num_pages, step_tokens, max_batch, page_size
        n = len(requests)
        self.cached, self.planned, self.given = [0] * n, [0] * n, [0] * n
        self.target = [prompt for _, prompt, _ in requests]
        self.pages, self.first_us, self.end_us = [0] * n, [0.0] * n, [0.0] * n
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.preempted: list[int] = []
        self.arrived = 0
        self.gave_way = False

    def run(self) -> np.ndarray:
        """(TTFT in s, TPOT in ms, end to end in s) of every request: float64 [n, 3]."""
        now, heat, parts = 0.0, 0.0, np.zeros(len(PARTS))
        step = self._plan(now)
        idle = True
        while step or self.arrived < len(self.requests):
            if not step:
                now, idle, heat = max(now, self.arrivals[self.arrived]), True, 0.0
                step = self._plan(now)
                continue
            chunks = [tokens for *_, tokens in step.chunks]
            warm = heat / self.costs.boost_us if self.costs.boost_us else 1.0
            us = step_parts(
                self.costs, np.array(step.lens, np.int64), np.array([b for _, b, _ in step.chunks], np.int64),
                np.array(chunks, np.int64), len(step.lens) + len(chunks), 0.0, warm, parts,
            )
            us *= self.costs.wake_factor if idle else 1.0
            heat = heated(self.costs, heat, len(step.lens) + sum(chunks), us)
            idle = False
            following = None
            if self.profile.steps_in_flight == 2:
                following = self._plan(now)
                if not following and self.arrived < len(self.requests) and self.arrivals[self.arrived] < now + us:
                    following = self._plan(self.arrivals[self.arrived])
            now += us
            self._end(step, now)
            step = following if self.profile.steps_in_flight == 2 else self._plan(now)
            step = step or self._plan(now)
        return self._results()

    def _plan(self, now: float) -> Step:
        while self.arrived < len(self.requests) and self.arrivals[self.arrived] <= now:
            self.waiting.append(self.arrived)
            self.arrived += 1
        step, budget, gave_way, at = Step(), self.step_tokens, False, 0
        while at < len(self.running) and budget > 0:
            request = self.running[at]
            prefilling = self.cached[request] < self.target[request]
            if not prefilling and self.planned[request] >= self.requests[request][2]:
                at += 1  # its last token is under way
                continue
            tokens = min(budget, self.target[request] - self.cached[request]) if prefilling else 1
            need = self._pages(self.cached[request] + tokens) - self.pages[request]
            while need > self.free and self.running[-1] != request:
                budget += self._give_way(step)
                gave_way = True
            if need > self.free:
                self._give_way(step)
                gave_way = True
                break
            self._take(request, need)
            if prefilling:
                step.chunks.append((request, self.cached[request], tokens))
            else:
                step.decode.append(request)
            budget -= tokens
            at += 1
        while not gave_way and budget > 0 and len(self.running) < self.max_batch and (self.preempted or self.waiting):
            request = self.preempted[-1] if self.preempted else self.waiting[0]
            tokens = min(budget, self.target[request])
            asked = self._pages(tokens if self.profile.admission == "chunk" else self.target[request])
            if asked > self.free:
                break
            (self.preempted.pop if self.preempted else lambda: self.waiting.pop(0))()
            self.running.append(request)
            self._take(request, self._pages(tokens))
            step.chunks.append((request, 0, tokens))
            budget -= tokens
        for request in step.decode:
            self.cached[request] += 1
            step.tokens_of.append(request)
        for request, begin, tokens in step.chunks:
            self.cached[request] = begin + tokens
            if self.cached[request] == self.target[request]:
                step.tokens_of.append(request)
        for request in step.tokens_of:
            self.planned[request] += 1
        step.lens = sorted((self.cached[request] for request in step.decode), reverse=True)
        return step

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _take(self, request: int, pages: int) -> None:
        self.free -= pages
        self.pages[request] += pages

    def _give_way(self, step: Step) -> int:
        """The latest leaves; returns the tokens that the step had planned of it."""
        self.gave_way = True
        request = self.running.pop()
        given_back = step.decode.count(request) + sum(tokens for who, _, tokens in step.chunks if who == request)
        step.decode = [who for who in step.decode if who != request]
        step.chunks = [chunk for chunk in step.chunks if chunk[0] != request]
        self.free += self.pages[request]
        self.pages[request] = self.cached[request] = 0
        self.target[request] = self.requests[request][1] + self.planned[request]
        self.preempted.append(request)
        return given_back

    def _end(self, step: Step, now: float) -> None:
        for request in step.tokens_of:
            self.given[request] += 1
            if self.given[request] == 1:
                self.first_us[request] = now
            if self.given[request] == self.requests[request][2]:
                self.end_us[request] = now
                self.free += self.pages[request]
                self.pages[request] = 0
                if request in self.running:
                    self.running.remove(request)

    def _results(self) -> np.ndarray:
        late_s = self.profile.output_ms / 1e3
        found = []
        for request, (arrival, _, output) in enumerate(self.requests):
            first, end = self.first_us[request] / 1e6 + late_s, self.end_us[request] / 1e6 + late_s
            found.append((first - arrival, (end - first) * 1e3 / max(1, output - 1), end - arrival))
        return np.array(found)
