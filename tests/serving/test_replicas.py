"""Several servers behind a router."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import DEVICE, MODEL, crowded, kv_gib, make_trace, waits

from pkvsim.serving import replicas
from pkvsim.serving.costs import default_policy
from pkvsim.serving.orders import ORDERS
from pkvsim.serving.server_config import ROUTERS, ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import FINISHED, SERVED

# One of steps one after the other, and one that plans a step while the one before it runs.
ENGINES = st.sampled_from(["pkv", "vllm"])


@settings(max_examples=40, deadline=None)
@given(crowded(blocks=True), st.integers(1, 4), st.sampled_from(ROUTERS), st.sampled_from(ORDERS), ENGINES, st.data())
def test_every_request_is_served_once_and_clients_wait_for_whichever_server(
    case, n, router, order, engine, data
) -> None:
    trace, config = case
    trace = data.draw(waits(trace))
    config = replace(config, replicas=n, router=router, order=order, prefix_cache="lru", engine=engine)
    result = simulate(trace, MODEL, DEVICE, default_policy(config), config)
    requests, served = result.requests, result.requests.rejected == SERVED
    np.testing.assert_array_equal(requests.output_tokens, np.where(served, trace.output_tokens, 0))
    assert result.allocated_pages == result.freed_pages + result.cached_pages
    assert [part["requests"] for part in result.summary["replicas"]] == np.bincount(
        requests.replica[served], minlength=n
    ).tolist()
    told_s = requests.arrival_s + (config.profile.queue_ms + config.profile.output_ms) / 1e3  # that it is refused
    ends, due = np.where(served, requests.finish_s, told_s), trace.arrival_s - trace.arrival_s[0]
    if trace.after is not None:
        follows = trace.after >= 0
        due[follows] = np.maximum(due, ends[trace.after] + trace.think_us / 1e6)[follows]
    assert (requests.arrival_s >= due - 1e-9).all() and (requests.queue_s[served] >= 0).all()
    if trace.concurrency is None:
        np.testing.assert_allclose(requests.arrival_s, due, rtol=1e-12, atol=1e-9)
        return
    for at in requests.arrival_s[served]:
        assert ((requests.arrival_s[served] <= at) & (ends[served] > at + 1e-9)).sum() <= trace.concurrency


@settings(max_examples=40, deadline=None)
@given(crowded(), st.integers(2, 3), ENGINES)
def test_round_robin_of_independent_requests_is_as_many_servers_alone(case, n, engine) -> None:
    trace, config = case[0], replace(case[1], engine=engine)
    policy = default_policy(config)
    result = simulate(trace, MODEL, DEVICE, policy, replace(config, replicas=n))
    served = np.flatnonzero(result.requests.rejected == SERVED)
    for at in range(n):
        own = served[at::n]
        assert (result.requests.replica[own] == at).all()
        if not len(own):
            continue
        part = replace(
            trace, arrival_s=trace.arrival_s[own], prompt_tokens=trace.prompt_tokens[own],
            output_tokens=trace.output_tokens[own],
        )  # fmt: skip
        alone = simulate(part, MODEL, DEVICE, policy, config).requests
        np.testing.assert_allclose(alone.ttft_s, result.requests.ttft_s[own], rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(alone.preemptions, result.requests.preemptions[own])


@pytest.mark.parametrize("coupled", [False, True])
def test_one_server_by_the_router_s_loop_is_the_loop_alone(coupled, monkeypatch) -> None:
    """Two servers, of which the second is never sent anything."""
    monkeypatch.setattr(replicas.Router, "route", lambda self, request: 0)
    trace = make_trace([(0.002, 150 + 31 * at % 97, 3 + 17 * at % 40) for at in range(60)])
    if coupled:
        trace = replace(trace, concurrency=5, after=np.arange(60) // 2 - 1, think_us=np.full(60, 4000.0))
    config = ServingConfig(max_batch=8, step_tokens=100)
    alone, two = (simulate(trace, MODEL, DEVICE, "balanced", replace(config, replicas=n)).requests for n in (1, 2))
    for name in ("arrival_s", "queue_s", "ttft_s", "finish_s"):
        np.testing.assert_allclose(getattr(two, name), getattr(alone, name), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(crowded(blocks=True), st.integers(2, 4), st.sampled_from(ROUTERS), st.booleans(), st.data())
def test_each_request_goes_where_its_router_says(case, n, router, with_blocks, data) -> None:
    """Decided anew from all that was sent before, and from what the servers have given by then."""
    trace, config = case
    trace = data.draw(waits(trace))
    if not with_blocks:
        trace = replace(trace, block_hashes=None, block_offsets=None)
    told: list[tuple[int, int]] = []

    class Plain(replicas.Router):
        def route(self, request: int) -> int:
            expected = self.expected(request)
            told.append((request, super().route(request)))
            assert told[-1][1] == expected
            return expected

        def expected(self, request: int) -> int:
            if router == "round-robin":
                return len(told) % n
            if router == "prefix":
                if with_blocks:
                    path = self.path(request)
                    known = [0] * n
                    for at in range(n):
                        seen = {block for other, owner in told if owner == at for block in self.path(other)}
                        while known[at] < len(path) and path[known[at]] in seen:
                            known[at] += 1
                    if 2 * max(known) >= len(path):
                        return known.index(max(known))
                elif trace.after is not None and trace.after[request] >= 0:
                    before = [owner for other, owner in told if other == trace.after[request]]
                    if before:  # a request that is refused was sent to no server
                        return before[0]
            left = [0] * n
            for other, owner in told:
                state = self._states[owner]
                if state.phase[other] != FINISHED:
                    left[owner] += trace.prompt_tokens[other] + trace.output_tokens[other] - state.generated[other]
            return left.index(min(left))

        def path(self, request: int) -> list[int]:
            return trace.block_hashes[trace.block_offsets[request] : trace.block_offsets[request + 1]].tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "Router", Plain)
        config = replace(config, replicas=n, router=router, prefix_cache="none")
        simulate(trace, MODEL, DEVICE, "balanced", config)


def test_least_tokens_and_prefix() -> None:
    rows = [(0, 3200, 400, [0]), (0, 320, 4, [1]), (0, 320, 4, [2]), (0, 320, 4, [3]), (1e-4, 3200, 4, [0])]
    trace = make_trace(rows, blocks=True)

    def owners(router):
        config = ServingConfig(replicas=2, router=router, prefix_cache="lru")
        return simulate(trace, MODEL, DEVICE, "balanced", config).requests.replica.tolist()

    assert owners("round-robin") == [0, 1, 0, 1, 0]
    assert owners("least-tokens") == [0, 1, 1, 1, 1]
    assert owners("prefix") == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(("path", "server"), [([0, 0, 1, 1], 0), ([0, 1, 1, 1], 1)])
def test_half_of_a_prompt_is_enough_to_go_where_it_was_sent(path, server) -> None:
    trace = make_trace([(0, 128, 99, [0]), (0, 128, 2, path)], blocks=True)
    config = ServingConfig(replicas=2, router="prefix", prefix_cache="lru")
    assert simulate(trace, MODEL, DEVICE, "balanced", config).requests.replica.tolist() == [0, server]


def test_what_is_kept_for_a_turn_goes_once_another_server_has_it() -> None:
    """Of 40 pages on the first server 21 are kept for the turn after request 0, and request 2's row has a few, so that
    there is no room for request 4 until that turn, request 3, has gone to the other server."""
    rows = [(0, 320, 2), (0.01, 16, 2), (0.04, 16, 300), (0.05, 400, 2), (0.1, 320, 2)]
    trace = replace(make_trace(rows), after=np.array([-1, -1, -1, 0, -1]), think_us=np.array([0, 0, 0, 1e5, 0]))
    found = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(
        replicas=2, router="round-robin", kv_gib=kv_gib(40), order="continuum", kv_ttl_s=1000.0)).requests  # fmt: skip
    assert found.replica.tolist() == [0, 1, 0, 1, 0]
    assert found.queue_s[4] < 0.01 and found.finish_s[4] < found.finish_s[2]


def test_who_follows_a_request_that_was_refused_goes_where_there_is_least_to_do() -> None:
    trace = make_trace([(0, 400, 60), (0, 9000, 2), (0, 32, 2)])
    trace = replace(trace, after=np.array([-1, -1, 1]), think_us=np.zeros(3))
    requests = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(
        replicas=2, router="prefix", kv_gib=kv_gib(100))).requests  # fmt: skip
    assert requests.rejected.astype(bool).tolist() == [False, True, False]
    assert requests.replica[[0, 2]].tolist() == [0, 1]
