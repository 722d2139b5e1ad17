"""Order policies: what their authors say of them, and what holds of all."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import BLOCK_TOKENS, DEVICE, MODEL, crowded, kv_gib, make_trace, waits
from test_serving import check_conserved

from pkvsim.serving.orders import ORDERS, batchllm_ranks, prefix_groups, program_ranks
from pkvsim.serving.results.summary import gap_percentiles
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import GAP_BINS, GAPS_PER_E, SERVED


def serve(trace, **options):
    return simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(**options))


def started(result) -> list[int]:
    """Requests in the order in which they began to run; ties in trace order."""
    return np.argsort(result.requests.arrival_s + result.requests.queue_s, kind="stable").tolist()


@settings(max_examples=50, deadline=None)
@given(crowded(blocks=True), st.sampled_from(ORDERS), st.sampled_from(["none", "lru", "infinite"]), st.data())
def test_all_are_served_whatever_the_order(case, order, cache, data) -> None:
    trace, config = case
    trace = data.draw(waits(trace))
    config = replace(config, order=order, prefix_cache="lru" if order == "kvshare" else cache)
    config = replace(config, kv_ttl_s=data.draw(st.sampled_from([0.0, 0.01, 100.0])))
    check_conserved(trace, config, simulate(trace, MODEL, DEVICE, "balanced", config))


def test_the_shortest_runs_first_and_the_longest_gives_way() -> None:
    trace = make_trace([(0, 64, output) for output in (9, 90, 3, 30)])
    assert started(serve(trace, max_batch=1, order="shortest")) == [2, 0, 3, 1]
    small = serve(make_trace([(0, 64, 80), (0, 64, 60), (0, 64, 70)]), kv_gib=kv_gib(20), keep_free_fraction=0, order="shortest")
    assert small.requests.preemptions[1] == 0 and small.requests.preemptions[0] > 0


def test_who_has_least_left_gives_way_last_however_much_it_had() -> None:
    """The first has given most of its 80 tokens as the second, which has 60 to give, takes the last pages."""
    trace = make_trace([(0, 64, 80), (0.3, 64, 60)])
    requests = serve(trace, kv_gib=kv_gib(13), keep_free_fraction=0, order="shortest").requests
    assert requests.preemptions[0] == 0 and requests.preemptions[1] > 0


def test_batchllm_runs_groups_of_a_prefix_together_decode_heavy_first() -> None:
    rows = [(0, 64, 2, [0]), (0, 64, 50, [1]), (0, 64, 2, [0]), (0, 64, 50, [1]), (0, 32, 200, [2]), (0, 64, 50, [1])]
    trace = make_trace(rows, blocks=True)
    group, shared = prefix_groups(trace)
    assert group.tolist() == [0, 1, 0, 1, 2, 1] and shared.tolist() == [64, 64, 32]
    # Output over computed prompt: 4 / 64, 150 / 64 and 200 / 32.
    assert started(serve(trace, max_batch=1, order="batchllm", prefix_cache="lru")) == [4, 1, 3, 5, 0, 2]


@settings(max_examples=60, deadline=None)
@given(crowded(blocks=True))
def test_batchllm_s_groups_share_what_they_say_and_save_as_much_as_any_cut(case) -> None:
    trace, _ = case
    group, shared = prefix_groups(trace)
    paths = [
        trace.block_hashes[begin:end].tolist() for begin, end in zip(trace.block_offsets[:-1], trace.block_offsets[1:])
    ]
    saved = 0
    for number, tokens in enumerate(shared.tolist()):
        members = np.flatnonzero(group == number)
        blocks = -(-tokens // BLOCK_TOKENS)
        assert len({tuple(paths[member][:blocks]) for member in members}) == 1
        assert (trace.prompt_tokens[members] >= tokens).all()
        saved += (len(members) - 1) * tokens

    def most(prefix: tuple[int, ...], members: list[int]) -> int:
        """Of all cuts of the tree below a prefix, written down as they are defined."""
        depth = len(prefix)
        length = min(depth * BLOCK_TOKENS, int(trace.prompt_tokens[members].min()))
        below: dict[int, list[int]] = {}
        for member in members:
            if len(paths[member]) > depth:
                below.setdefault(paths[member][depth], []).append(member)
        return max((len(members) - 1) * length, sum(most((*prefix, b), inner) for b, inner in below.items()))

    assert saved == most((), list(range(len(trace))))


@settings(max_examples=60, deadline=None)
@given(crowded(blocks=True), st.data())
def test_ranks_of_groups_and_programs_are_as_they_are_defined(case, data) -> None:
    trace = data.draw(waits(case[0]))
    group, shared = prefix_groups(trace)
    ratio = []
    for number, tokens in enumerate(shared.tolist()):
        own = group == number
        computed = int(trace.prompt_tokens[own].sum()) - (int(own.sum()) - 1) * tokens
        ratio.append(trace.output_tokens[own].sum() / max(1, computed))
    rank = batchllm_ranks(trace)
    for one in range(len(trace)):
        for other in range(one):
            if group[one] == group[other]:
                assert rank[one] == rank[other]
            elif ratio[group[one]] != ratio[group[other]]:
                assert (rank[one] < rank[other]) == (ratio[group[one]] > ratio[group[other]])
            else:  # the group that comes first in the trace
                assert (rank[one] < rank[other]) == (group[one] < group[other])
    for request in range(len(trace)):
        first = request
        while trace.after is not None and trace.after[first] >= 0:
            first = int(trace.after[first])
        assert program_ranks(trace)[request] == first


def test_kvshare_runs_first_what_the_cache_holds_most_of() -> None:
    rows = [(0, 320, 4, [0]), (0, 320, 4, [1]), (0, 320, 4, [2]), (0, 320, 4, [0]), (0, 640, 4, [0])]
    trace = make_trace(rows, blocks=True)
    assert started(serve(trace, max_batch=1, order="kvshare", prefix_cache="lru")) == [0, 3, 4, 1, 2]
    with pytest.raises(ValueError, match="order: kvshare orders by what a prefix cache holds"):
        serve(trace, order="kvshare")


def conversation(think_s: float):
    """Request 2 is the second turn of request 0's conversation; 1 and 3 are others, and all but 2 come at once."""
    trace = make_trace([(0, 100, 50), (0, 400, 400), (0, 150 + 40, 20), (0, 400, 400)])
    return replace(
        trace, after=np.array([-1, -1, 0, -1]), session=np.array([0, 1, 0, 2]), think_us=np.full(4, think_s * 1e6)
    )


def test_continuum_serves_programs_first_come_first_served() -> None:
    trace = conversation(0.001)
    assert program_ranks(trace).tolist() == [0, 1, 0, 3]
    assert started(serve(trace, max_batch=1, order="fcfs")) == [0, 1, 3, 2]
    assert started(serve(trace, max_batch=1, order="continuum")) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ttl_s", "hit"), [(5, 149), (1, 0)])
def test_continuum_keeps_the_kv_of_a_turn_for_a_while(ttl_s, hit) -> None:
    """Prompt and output of the first turn but its last token, which was never computed."""
    requests = serve(conversation(2.0), order="continuum", kv_ttl_s=ttl_s).requests
    assert requests.hit_tokens.tolist() == [0, 0, hit, 0]
    assert not serve(conversation(2.0)).requests.hit_tokens.any()


def test_kv_is_kept_for_a_turn_that_was_sent_in_time_however_long_it_waits() -> None:
    """Requests 1 and 3 are others'; the second turn is sent within the time, and admitted behind them after it."""
    trace = replace(conversation(0.5), session=np.array([1, 0, 1, 0]))
    requests = serve(trace, order="continuum", kv_ttl_s=1.0, max_batch=1).requests
    ended, sent = requests.finish_s[0], requests.arrival_s[2]
    assert sent <= ended + 1.0 < sent + requests.queue_s[2]
    assert requests.hit_tokens[2] == 149


def test_kept_kv_goes_before_a_running_request_has_to() -> None:
    trace = make_trace([(0, 160, 2), (0.001, 160, 100), (0, 200, 2)])
    trace = replace(trace, after=np.array([-1, -1, 0]), think_us=np.full(3, 60e6))
    result = serve(trace, order="continuum", kv_ttl_s=100, kv_gib=kv_gib(17), keep_free_fraction=0)
    assert not result.requests.preemptions.any() and not result.requests.hit_tokens.any()


@pytest.mark.parametrize(("arrival_s", "prompt", "output"), [(0.001, 160, 100), (1.0, 320, 2)])
def test_of_kept_kv_the_latest_goes_first(arrival_s, prompt, output) -> None:
    """Where a running request grows, and where one that nothing runs beside is to be admitted: 11 pages are kept of
    each of the first two, and 34 there are."""
    trace = make_trace([(0, 160, 2), (0, 160, 4), (arrival_s, prompt, output), (0, 200, 2), (0, 200, 2)])
    trace = replace(trace, after=np.array([-1, -1, -1, 0, 1]), think_us=np.full(5, 60e6))
    options = {"order": "continuum", "kv_ttl_s": 100, "keep_free_fraction": 0}
    result = serve(trace, kv_gib=kv_gib(34), **options)
    assert not result.requests.preemptions.any()
    assert result.requests.finish_s[0] < result.requests.finish_s[1]
    assert result.requests.hit_tokens.tolist() == [0, 0, 0, 161, 0]
    assert serve(trace, kv_gib=kv_gib(60), **options).requests.hit_tokens.tolist() == [0, 0, 0, 161, 163]


@settings(max_examples=60, deadline=None)
@given(crowded())
def test_times_between_tokens_are_those_of_the_steps(case) -> None:
    trace, config = case
    result = simulate(trace, MODEL, DEVICE, "balanced", config)
    told, steps, requests = result.summary["itl_s"], result.steps, result.requests
    served = requests.rejected == SERVED
    assert result.gaps.sum() == (trace.output_tokens - 1)[served].sum()
    waited_s = result.gaps @ np.exp((np.arange(GAP_BINS) + 0.5) / GAPS_PER_E) / 1e6
    first_s = requests.arrival_s + requests.ttft_s
    assert waited_s == pytest.approx((requests.finish_s - first_s)[served].sum(), rel=0.003)
    if requests.preemptions.any() or not waited_s:
        return
    gaps = np.repeat(steps.duration_us, steps.decode_rows.astype(int)) / 1e6
    for p in (50, 90, 99):
        assert told[f"p{p}"] == pytest.approx(np.percentile(gaps, p, method="inverted_cdf"), rel=0.006)


def test_nobody_waits_between_no_tokens() -> None:
    assert gap_percentiles(np.zeros(4, np.int64)) == {"p50": None, "p90": None, "p99": None}
