"""pkvsim.studies.lend: each way against a plain statement of its arithmetic, and what holds whatever happens."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.devices.device import get_device
from pkvsim.models.presets import get_model
from pkvsim.pricing.kv_parallel import MERGE_US
from pkvsim.studies.lend import run
from pkvsim.studies.lend.cluster import Cluster, Job
from pkvsim.studies.lend.prices import HOST_GB_S, LendPrices
from pkvsim.studies.lend.run import WAYS, serve_lending
from pkvsim.traces.requests import RequestTrace


@dataclass(frozen=True)
class Round:
    """Prices in round numbers."""

    def rest_us(self, rows: int, chunk_tokens: int) -> float:
        return 100.0 * (rows > 0) + 10.0 * chunk_tokens

    def prefill_us(self, tokens: int) -> float:
        return 0.0

    def attention_us(self, tokens: int) -> float:
        return float(tokens)

    def exchange_us(self, rows: int) -> float:
        return 7.0 * rows

    def move_us(self, tokens: int) -> float:
        return 3.0 * tokens

    def swap_us(self, tokens: int) -> float:
        return 5.0 * tokens


def trace(*requests: tuple[float, int, int]) -> RequestTrace:
    """(arrival in us, prompt, output) of each."""
    at, prompt, output = map(np.array, zip(*requests))
    return RequestTrace("made up", at / 1e6, prompt, output)


def serve(way: str, requests: RequestTrace, **more):
    return serve_lending(requests, Round(), way=way, **{"replicas": 2, "pages": 4, "page_size": 4} | more)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_alone_takes_its_prompt_and_its_steps(way) -> None:
    """A prompt of 6 at 10 us a token, then steps of 100 us that attend to 6, 7 and 8 cached tokens."""
    found = serve(way, trace((0, 6, 4)))
    assert found.first_token_us[0] == 60 and found.latency_us[0] == 60 + 106 + 107 + 108
    assert found.tally.steps == 4 and not found.tally.borrowed_pages


def test_every_way_stated_plainly() -> None:
    """Two replicas of 4 pages of 4 tokens: A and C (3 tokens, 8 of output) on the first, as D (11, 4) is on the other.

    A and C begin together: 60 us for 6 prompt tokens. Steps of 100 + the cached tokens of both, 3 each at first, end
    with 4, 5, 6, 7 cached. Then A has 8 tokens to cache and its next needs a third page: pages_of(9) is 3, and both
    hold 2 of 4. The last admitted, C with 7 cached, leaves."""
    requests, config = trace((0, 3, 8), (0, 11, 4), (0, 3, 8)), {"pages": 4}
    times = [60.0]
    for cached in (3, 4, 5, 6):
        times.append(times[-1] + 100 + 2 * cached)
    full_us = times[-1]  # both have generated 5 of 8
    # A alone, with 7, 8 and 9 cached.
    alone = full_us + sum(100 + cached for cached in (7, 8, 9))

    swapped = serve("preempt", requests, **config)
    assert swapped.latency_us[0] == alone and swapped.tally.swaps == 1
    # C's 7 tokens go out at 5 us each and come in at 5 again when A has gone, then it goes on alone.
    back = max(alone, full_us + 35) + 35
    assert swapped.latency_us[2] == back + sum(100 + cached for cached in (7, 8, 9))

    again = serve("recompute", requests, **config)
    assert again.latency_us[0] == alone and (again.tally.recomputes, again.tally.recomputed_tokens) == (1, 7)
    # When A has gone, C's 8 tokens are computed at 10 us each, which gives its sixth; two more steps.
    assert again.latency_us[2] == alone + 80 + sum(100 + cached for cached in (8, 9))

    moved = serve("move", requests, **config)
    # D: 110 us for its prompt, steps of 100 + 11, 12, 13: gone at 446, before the others are full at 496.
    assert full_us > 110 + 336
    assert moved.tally.moves == 1 and moved.latency_us[0] == alone
    assert moved.latency_us[2] == full_us + 3 * 7 + sum(100 + cached for cached in (7, 8, 9))

    borrowed = serve("borrow", requests, **config)
    # Each takes a page of replica 1: A looks first, then C. Until more than 8 are cached none of their tokens is there;
    # then one of each is, at the same time as 16 at home: 100 + 16, and an exchange of two rows.
    steps = [(7, 0), (8, 0), (8, 1)]
    end = full_us + sum(100 + max(2 * own, 2 * away) + (14 if away else 0) for own, away in steps)
    assert borrowed.latency_us[[0, 2]].tolist() == [end, end] and borrowed.tally.borrowed_pages == 2


@pytest.mark.parametrize("way", ["preempt", "recompute"])
def test_who_gave_way_comes_back_before_those_that_never_ran(way) -> None:
    """As above, with a request of 3 tokens that comes while both run: when C leaves there is a page for it, but C's turn
    comes first, when A has ended."""
    found = serve(way, trace((0, 3, 8), (0, 11, 4), (0, 3, 8), (1, 3, 8)), pages=4, max_batch=2)
    assert found.tally.swaps + found.tally.recomputes >= 1
    assert 1 + found.first_token_us[3] > found.latency_us[0]


@given(st.integers(-2, 2), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.integers(0, 3),
       st.sampled_from(WAYS))  # fmt: skip
def test_a_row_is_admitted_where_its_next_token_has_a_page(more, free, elsewhere, both, running, way) -> None:
    """On its own replica; one that no replica can hold spreads over all, where rows may borrow."""
    tokens = max(1, 4 * (free + both * elsewhere) + more)
    cluster = Cluster(2, pages=9, page_size=4)
    for at, pages in enumerate((free, elsewhere)):
        cluster.replicas[at].free = pages
    cluster.replicas[0].running = [Job(at, 0.0, 1, 9) for at in range(running)]
    asked = Job(9, 0.0, tokens, 5)
    room = free + elsewhere if way == "borrow" and tokens + 5 > 36 else free
    assert run._Run(cluster, Round(), way, 3)._fits(0, asked) == (running < 3 and tokens + 1 <= 4 * room)


lens = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lens, st.sampled_from(WAYS), st.integers(2, 4), st.integers(2, 30), st.integers(1, 6))
def test_whoever_fits_is_served_and_all_pages_come_back(requests, way, replicas, pages, max_batch) -> None:
    requests, clusters = trace(*sorted(requests)), []

    class Seen(Cluster):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            clusters.append(self)

        def take(self, *args) -> None:
            assert all(len(replica.running) <= max_batch for replica in self.replicas)
            super().take(*args)

        def give_back(self, *args) -> None:
            assert all(len(replica.running) <= max_batch for replica in self.replicas)
            super().give_back(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Cluster", Seen)
        found = serve(way, requests, replicas=replicas, pages=pages, max_batch=max_batch)
    assert [replica.free for replica in clusters[0].replicas] == [pages] * replicas
    whole = -(-(requests.prompt_tokens + requests.output_tokens) // 4)
    fits = whole <= pages * (replicas if way == "borrow" else 1)
    assert (np.isfinite(found.latency_us) == fits).all() and found.tally.rejected == (~fits).sum()
    assert found.output_tokens == requests.output_tokens[fits].sum()
    assert way == "borrow" or not found.tally.borrowed_pages
    assert (found.latency_us[fits] >= found.first_token_us[fits]).all() and (found.first_token_us[fits] > 0).all()


@pytest.mark.parametrize(("free", "but", "found"), [((5, 9, 7), 1, 2), ((5, 9, 7), 0, 1), ((6, 6, 6), 0, 1), ((6, 5, 5), 0, 1)])
def test_the_roomiest_of_the_others(free, but, found) -> None:
    cluster = Cluster(3, pages=9, page_size=4)
    for replica, pages in zip(cluster.replicas, free):
        replica.free = pages
    assert cluster.roomiest(but) == found and Cluster(1, pages=9, page_size=4).roomiest(0) == -1


@pytest.mark.parametrize("max_batch", [1, 2])
def test_a_row_moves_where_a_row_more_may_run(max_batch) -> None:
    cluster = Cluster(2, pages=9, page_size=4)
    for at in range(2):
        cluster.replicas[at].running.append(Job(at, 0.0, 3, 9, home=at, cached=3))
        cluster.take(cluster.replicas[at].running[0], at, 1)
    run._Run(cluster, Round(), "move", max_batch)._evict(0, 0.0)
    assert (cluster.tally.moves, cluster.tally.recomputes) == ((0, 1) if max_batch == 1 else (1, 0))


def test_a_lender_makes_up_for_all_who_borrow_of_it() -> None:
    cluster = Cluster(3, pages=9, page_size=4)
    for at, (pages, cached) in enumerate([({0: 1, 2: 2}, 10), ({1: 1, 2: 1}, 7), ({2: 1}, 1)]):
        job = Job(at, 0.0, 1, 99, home=at, cached=cached)
        cluster.replicas[at].running.append(job)
        for replica, count in pages.items():
            cluster.take(job, replica, count)
    served = run._Run(cluster, Round(), "borrow", 8)
    served._begin(0, 0.0)
    served._begin(1, 0.0)
    assert cluster.replicas[2].debt_us == cluster.tally.lent_us == 6 + 3  # tokens beyond the first page of each
    served._begin(2, 0.0)
    assert cluster.replicas[2].ready_us == 100 + 1 + 9 and cluster.replicas[2].debt_us == 0


def test_a_step_begins_with_the_first_row_that_is_there() -> None:
    """Whose KV is on its way holds up nobody else; who waits counts where it may be admitted."""
    cluster = Cluster(2, pages=4, page_size=4)
    replica, served = cluster.replicas[0], run._Run(cluster, Round(), "move", 3)
    assert served._begins_us(0, 2.0) == np.inf
    replica.running += [Job(at, 0.0, 3, 9, home=0, cached=3, available_us=us) for at, us in enumerate((50.0, 20.0))]
    assert served._begins_us(0, 2.0) == 20 and served._begins_us(0, 30.0) == 30
    replica.waiting.append(Job(2, 0.0, 3, 9, home=0, available_us=7.0))
    assert served._begins_us(0, 2.0) == 7
    replica.free = 0
    assert served._begins_us(0, 2.0) == 20


@pytest.mark.parametrize(("now_us", "available_us", "back_us"), [(9.0, 4.0, 24.0), (9.0, 30.0, 45.0)])
def test_a_row_goes_to_host_memory_once_it_is_there(now_us, available_us, back_us) -> None:
    cluster = Cluster(2, pages=4, page_size=4)
    job = Job(0, 0.0, 3, 9, home=0, cached=3, available_us=available_us)
    cluster.replicas[0].running.append(job)
    run._Run(cluster, Round(), "preempt", 4)._evict(0, now_us)
    assert (job.swapped, job.available_us, cluster.tally.swaps) == (True, back_us, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_prompts_that_begin_together_pay_for_the_attention_of_each(prompts) -> None:
    class Attended(Round):
        def prefill_us(self, tokens: int) -> float:
            return 0.5 * tokens**2

    found = serve_lending(trace(*((0, prompt, 1) for prompt in prompts)), Attended(), way="move", replicas=2, pages=99)
    homes, expected = [0, 0], []
    for prompt in prompts:  # each to the replica with the fewest tokens
        home = int(np.argmin(homes))
        homes[home] += prompt
        expected.append(home)
    for at, us in enumerate(found.latency_us):
        own = [prompt for prompt, home in zip(prompts, expected) if home == expected[at]]
        assert us == pytest.approx(10 * sum(own) + sum(0.5 * prompt**2 for prompt in own))


@given(lens)
@settings(max_examples=20, deadline=None)
def test_with_room_for_all_the_ways_are_one(requests) -> None:
    requests = trace(*sorted(requests))
    found = [serve(way, requests, pages=1000) for way in WAYS]
    assert all((one.latency_us == found[0].latency_us).all() and one.tally == found[0].tally for one in found)


def test_prices_are_the_rooflines_that_are_stated() -> None:
    model, device = get_model("llama-3.1-8b"), get_device("h200")
    prices = LendPrices(model, device)
    token = 32 * 8 * 128 * 2 * 2
    assert prices.token_bytes == token
    assert prices.attention_us(1000) == pytest.approx(1000 * token / device.beta_gb_s / 1e3)
    assert prices.move_us(1000) == pytest.approx(1000 * token / 450e3 + 0.68)
    assert prices.swap_us(1000) == pytest.approx(1000 * token / HOST_GB_S / 1e3)
    assert prices.exchange_us(1) == pytest.approx(32 * (0.68 + 32 * 130 * 4 / 2 / 450e3 + MERGE_US))
    assert prices.rest_us(1, 0) == pytest.approx(16.06e9 / device.beta_gb_s / 1e3, rel=0.07)  # reads the weights
    computed = 2 * 8.03e9 * 4000 / (0.6 * device.fp16_tflops * 1e6)
    assert prices.rest_us(0, 4000) == pytest.approx(computed, rel=0.07)
    assert prices.prefill_us(1000) == pytest.approx(32 * 4 * 32 * 128 * 1000**2 / 2 / (0.6 * device.fp16_tflops * 1e6), rel=0.01)


@pytest.mark.parametrize(("more", "name"), [
    ({"way": "steal"}, "lend"), ({"replicas": 1}, "replicas"), ({"pages": 0}, "pages"), ({"max_batch": 0}, "max_batch"),
])
def test_what_cannot_be_is_refused_by_name(more, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        serve(more.pop("way", "borrow"), trace((0, 3, 3)), **more)
