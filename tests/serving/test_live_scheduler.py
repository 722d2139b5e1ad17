"""LiveScheduler: requests come and end at any time; its decisions are the simulator's, its pages are never two owners'."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from serving_cases import DEVICE, MODEL, kv_gib, make_trace

from pkvsim.memory.prefix_cache import FREE_PAGES, KINDS
from pkvsim.serving.live.live_scheduler import LiveScheduler
from pkvsim.serving.orders import KVSHARE, SHORTEST
from pkvsim.serving.scheduler import Scheduler
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of, requests_of
from pkvsim.serving.state import Limits

PAGE = 4


def limits(*, num_pages=24, max_batch=4, step_tokens=16, cache="lru", order=0, keep_free=0) -> Limits:
    return Limits(PAGE, num_pages, keep_free, max_batch, step_tokens, KINDS.index(cache), order)


def tokens(*runs: tuple[int, int]) -> np.ndarray:
    return np.concatenate([np.full(count, token, np.int32) for token, count in runs])


class Machine(RuleBasedStateMachine):
    """Adds, cancels and steps, beside a plain account of what every request has computed."""

    @initialize(cache=st.sampled_from(["none", "lru"]), num_pages=st.integers(6, 30), keep_free=st.integers(0, 2))
    def start(self, cache, num_pages, keep_free):
        self.scheduler = LiveScheduler(limits(num_pages=num_pages, cache=cache, keep_free=keep_free))
        self.now, self.next_key = 0.0, 0
        self.prompt, self.output, self.given = {}, {}, {}
        self.holds: dict[int, tuple] = {}  # page: the tokens' names that lie in it
        self.table: dict[int, list[int]] = {}

    @rule(head=st.integers(0, 2), length=st.integers(1, 30), own=st.integers(0, 12), output=st.integers(1, 20))
    def add(self, head, length, own, output):
        key, self.next_key = self.next_key, self.next_key + 1
        prompt = tokens((head, length), (100 + key, own))
        if self.scheduler.pages_needed(len(prompt), output) > self.scheduler.limits.num_pages:
            with pytest.raises(ValueError, match="prompt: expected"):
                self.scheduler.add(key, prompt=prompt, output_tokens=output, now_us=self.now)
            return
        self.scheduler.add(key, prompt=prompt, output_tokens=output, now_us=self.now)
        self.prompt[key], self.output[key], self.given[key] = prompt.tolist(), output, 0

    def _write(self, key, begin, end):
        """Marks pages as holding the tokens [begin, end) of a request; earlier ones must be there."""
        text = self.prompt[key] + [-key - 1] * self.given[key]
        for at in range(begin, end):
            page = self.table[key][at // PAGE]
            self.holds[page] = (self.holds.get(page, ()) + (None,) * PAGE)[: at % PAGE] + ((tuple(text[: at + 1])),)

    def _read(self, key, end):
        text = self.prompt[key] + [-key - 1] * self.given[key]
        for at in range(end):
            assert self.holds[self.table[key][at // PAGE]][at % PAGE] == tuple(text[: at + 1])

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def step(self):
        self.now += 10.0
        step = self.scheduler.next_step(self.now)
        assert 0 < step.tokens <= self.scheduler.limits.step_tokens
        for key in step.preempted.tolist():
            del self.table[key]
        for new in step.new_pages:
            assert new.first == (0 if new.request in step.admitted else len(self.table[new.request]))
            self.table[new.request] = self.table.get(new.request, [])[: new.first] + new.page_ids
        for key, begin, count in zip(step.prefill.tolist(), step.prefill_begins.tolist(), step.prefill_tokens.tolist()):
            self._write(key, begin, begin + count)
        for key, length in zip(step.decode.tolist(), step.decode_lens.tolist()):
            assert length == len(self.prompt[key]) + self.given[key]
            self._write(key, length - 1, length)
        for key, begin, count in zip(step.prefill.tolist(), step.prefill_begins.tolist(), step.prefill_tokens.tolist()):
            self._read(key, begin + count)
        for key, length in zip(step.decode.tolist(), step.decode_lens.tolist()):
            self._read(key, length)
        for key in [*step.decode.tolist(), *step.prefill[step.ends].tolist()]:
            self.given[key] += 1
        for key in self.scheduler.end_step(self.now).tolist():
            assert self.given.pop(key) == self.output.pop(key)
            del self.prompt[key], self.table[key]
        assert all(self.given[key] < self.output[key] for key in self.given)

    @precondition(lambda self: self.prompt)
    @rule(data=st.data())
    def cancel(self, data):
        key = data.draw(st.sampled_from(sorted(self.prompt)))
        self.scheduler.cancel(key, self.now)
        del self.prompt[key], self.output[key], self.given[key]
        self.table.pop(key, None)

    @invariant()
    def pages_are_accounted_for(self):
        if hasattr(self, "scheduler"):
            self.scheduler.pages.check(list(self.table))
            assert self.scheduler.pages.num_free_pages == self.scheduler.state.pool.counts[FREE_PAGES]

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.prompt


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase


def test_the_shortest_answer_runs_first():
    scheduler = LiveScheduler(limits(order=SHORTEST, max_batch=1))
    for key, output in enumerate((9, 3, 12, 5)):
        scheduler.add(key, prompt=tokens((key, 4)), output_tokens=output, now_us=0.0)
    ended: list[int] = []
    while scheduler.has_work:
        scheduler.next_step(0.0)
        ended += scheduler.end_step(0.0).tolist()
    assert ended == [1, 3, 0, 2]


def test_same_steps_as_the_scheduler_of_traces():
    rows = [(0.0, 5 + 7 * at % 60, 3 + 5 * at % 17) for at in range(40)]
    trace = make_trace(rows)
    config = ServingConfig(kv_gib=kv_gib(20), max_batch=6, step_tokens=40)
    within = limits_of(MODEL, DEVICE, config)
    known = Scheduler(requests_of(trace, MODEL, config, within), within)
    live = LiveScheduler(within)
    for key, (_, prompt, output) in enumerate(rows):
        live.add(key, prompt=np.arange(prompt, dtype=np.int32), output_tokens=output, now_us=0.0)
    steps = 0
    while live.has_work:
        one, other = known.next_step(float(steps)), live.next_step(float(steps))
        for name in ("decode", "decode_lens", "prefill", "prefill_begins", "prefill_tokens", "admitted", "preempted"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert sorted(known.end_step(steps + 0.5)) == sorted(live.end_step(steps + 0.5))
        steps += 1
    assert known.state.counts[:3].sum() == 0 and int(known.state.preemptions.sum()) > 0


def test_memory_follows_the_requests_at_hand():
    scheduler = LiveScheduler(limits(num_pages=64))
    for key in range(3000):
        scheduler.add(key, prompt=np.arange(key, key + 20, dtype=np.int32), output_tokens=2, now_us=float(key))
        while scheduler.has_work:
            scheduler.next_step(float(key))
            scheduler.end_step(float(key))
    assert len(scheduler.requests.prompt) <= 128 and len(scheduler.requests.blocks.tokens) <= 512
    assert scheduler.pages.num_free_pages + int((scheduler.pages.page_of_block >= 0).sum()) == 64


@pytest.mark.parametrize(("changes", "match"), [
    ({"cache": "belady"}, "prefix_cache: expected none or lru"),
    ({"order": 2}, "order: expected one of"),
    ({"order": KVSHARE, "cache": "none"}, "order: kvshare"),
])
def test_refusals(changes, match):
    with pytest.raises(ValueError, match=match):
        LiveScheduler(limits(**changes))
