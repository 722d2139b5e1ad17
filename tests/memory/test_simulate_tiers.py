"""The simulated tiers: load times by arithmetic, bounds of policies, and the choice between loading and computing."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.memory.device_clock import DeviceClock
from pkvsim.memory.load_or_recompute import choose_prefix, load_times_s
from pkvsim.memory.retention import choose_ttl_s
from pkvsim.memory.simulate_tiers import BlockRequests, simulate_tiers
from pkvsim.memory.tier_options import TierOptions
from pkvsim.memory.tier_presets import SERIAL_FILES, TIER_PRESETS, UNIFIED_POOL
from pkvsim.memory.tiers import Tier


def tier(name, blocks, rate):
    return Tier(name=name, kind="disk", capacity_bytes=blocks * 100, read_bytes_per_s=rate, write_bytes_per_s=rate)


def requests(prompts, gap_s=1e6):
    lengths = [len(prompt) for prompt in prompts]
    return BlockRequests(
        np.arange(len(prompts)) * gap_s, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        np.array([block for prompt in prompts for block in prompt], np.int64),
    )  # fmt: skip


def test_all_devices_at_once_or_one_after_the_other():
    tiers, asked = [tier("a", 99, 300.0), tier("b", 99, 100.0)], requests([range(8)] * 2)
    pooled = simulate_tiers(asked, tiers, block_bytes=100)
    assert pooled.hits.tolist() == [0, 8] and pooled.bytes_by_tier[1].tolist() == [600, 200]
    assert pooled.blocked_s[1].tolist() == [2.0, 2.0] and pooled.load_s.tolist() == [0.0, 2.0]
    serial = simulate_tiers(asked, tiers, block_bytes=100, options=TierOptions(serial=True))
    assert serial.load_s[1] == 4.0 and serial.blocked_s[1].tolist() == [2.0, 4.0]
    equal = simulate_tiers(asked, tiers, block_bytes=100, options=TierOptions(placement="equal"))
    assert equal.load_s[1] == 4.0  # twice the slowest
    linked = simulate_tiers(asked, tiers, block_bytes=100, options=TierOptions(link_bytes_per_s=200.0))
    assert linked.load_s[1] == 4.0


def test_requests_that_come_together_wait_for_each_other():
    asked = requests([range(4), range(4), range(4)])._replace(arrival_s=np.array([0.0, 100.0, 101.0]))
    loads = simulate_tiers(asked, [tier("a", 9, 100.0)], block_bytes=100)
    assert loads.load_s.tolist() == [0.0, 4.0, 7.0]


def test_the_link_and_each_device_do_one_thing_after_another():
    """Two devices of 100 bytes/s that answer after 0.5 s, behind a link of 50 bytes/s."""
    tiers = [replace(tier(name, 99, 100.0), read_latency_s=0.5) for name in "ab"]
    clock = DeviceClock(tiers, link_bytes_per_s=50.0)
    assert clock.load_times_s([0, 1], 100, 0.0).tolist() == [0.0, 2.0, 4.0]  # by the link
    assert clock.read(np.array([100, 0]), 0.0).end_s == 2.0
    other = clock.read(np.array([0, 100]), 0.0)
    assert other.ends_s.tolist() == [0.0, 1.5] and other.end_s == 4.0  # the link was busy until 2 s
    wide = DeviceClock(tiers)
    assert wide.load_times_s([0, 1, 0], 100, 0.0).tolist() == [0.0, 1.5, 1.5, 2.5]
    assert wide.read(np.array([100, 0]), 0.0).end_s == 1.5
    assert wide.load_times_s([0], 100, 1.0).tolist() == [0.0, 2.0]  # 0.5 s of the read before are left


PROMPTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=40).map(
    lambda pairs: [[10 * branch * (depth > 1) + depth for depth in range(length)] for branch, length in pairs]
)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.integers(1, 12))
def test_no_policy_hits_more_than_everything_kept(prompts, slots):
    asked = requests(prompts)
    everything = simulate_tiers(asked, [tier("a", 10**4, 1.0)], block_bytes=100)
    for retention, admission in (("lru", "all"), ("belady", "all"), ("lru", "tinylfu")):
        options = TierOptions(retention=retention, admission=admission)
        some = simulate_tiers(asked, [tier("a", slots, 1.0)], block_bytes=100, options=options)
        assert (some.hits <= everything.hits).all() and (some.hits <= some.blocks).all()
        assert (some.bytes_by_tier.sum(axis=1) == some.loaded * 100).all()


@settings(max_examples=80, deadline=None)
@given(PROMPTS, st.integers(1, 12))
def test_a_tier_keeps_the_prompts_used_last_from_their_start(prompts, slots):
    """Against a list of blocks, those that go first in front: a prompt's own, deepest first, are its end."""
    there, evicted, refused, hits = [], 0, 0, []
    for prompt in prompts:
        hits.append(next((depth for depth, block in enumerate(prompt) if block not in there), len(prompt)))
        others = [block for block in there if block not in prompt]
        kept = [block for block in prompt if block in there]
        for block in (block for block in prompt if block not in there):
            if len(others) + len(kept) == slots and others:
                others, evicted = others[1:], evicted + 1
            if len(others) + len(kept) == slots:
                break
            kept.append(block)
        refused += len(prompt) - len(kept)
        there = others + [block for block in reversed(prompt) if block in kept]
    found = simulate_tiers(requests(prompts), [tier("a", slots, 1.0)], block_bytes=100)
    assert found.hits.tolist() == hits and (found.evicted, found.refused) == (evicted, refused)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.integers(1, 8))
def test_knowing_the_future_keeps_what_comes_again_first(prompts, slots):
    """Of prompts of one block: what is given up is what comes again last."""
    blocks, there, hits = [prompt[-1] for prompt in prompts], [], []
    for at, block in enumerate(blocks):
        hits.append(int(block in there))
        if block not in there:
            if len(there) == slots:
                left = blocks[at + 1 :]
                there.remove(max(there, key=lambda one: left.index(one) if one in left else len(blocks)))
            there.append(block)
    options = TierOptions(retention="belady")
    asked = requests([[block] for block in blocks])
    assert simulate_tiers(asked, [tier("a", slots, 1.0)], block_bytes=100, options=options).hits.sum() == sum(hits)


@given(st.integers(1, 9), st.integers(0, 12), st.floats(0.01, 10), st.sampled_from([1, 2, 5]),
       st.sampled_from(["host", "disk"]))  # fmt: skip
def test_layers_are_computed_as_they_arrive(blocks, rest, token_s, layers, kind):
    """Layer by layer from host memory: each once it is there and the one before it is computed. All at once from a
    disk."""
    asked = requests([range(blocks), range(blocks + rest)])
    source = replace(tier("a", 99, 100.0), kind=kind)
    found = simulate_tiers(asked, [source], block_bytes=100, options=TierOptions(num_layers=layers),
                           compute_s=lambda i, n: (blocks + i * rest - n) * token_s)  # fmt: skip
    loaded = int(found.loaded[1])
    layers, computed_s, at_s = layers if kind == "host" else 1, (blocks + rest - loaded) * token_s, 0.0
    for layer in range(layers):
        at_s = max(at_s, loaded * (layer + 1) / layers) + computed_s / layers
    assert found.ttft_s[1] == pytest.approx(at_s)


def test_belady_beats_lru_on_a_loop():
    """Prompts of one block asked for in turn, one more than there is room for: LRU hits nothing."""
    asked = requests([[i % 5] for i in range(100)])
    lru, belady = (simulate_tiers(asked, [tier("a", 4, 1.0)], block_bytes=100, options=TierOptions(retention=name))
                   for name in ("lru", "belady"))
    assert lru.hits.sum() == 0 and belady.hits.sum() >= 70


@given(st.lists(st.integers(0, 2), max_size=12), st.floats(0.01, 5), st.floats(0, 3), st.sampled_from([1, 4]))
def test_the_choice_is_the_best_of_all(places, token_s, backlog, layers):
    rates = np.array([100.0, 50.0, 10.0])
    times = load_times_s(places, 100, rates, backlog_s=[0.0, backlog, 0.0], link_bytes_per_s=90.0)
    for n in range(len(places) + 1):
        counts = np.bincount(places[:n], minlength=3)
        wanted = max([counts[i] * 100 / rates[i] + (backlog if i == 1 else 0) for i in range(3) if counts[i]] + [n * 100 / 90])
        assert times[n] == pytest.approx(wanted if n else 0)
    choice = choose_prefix(times, lambda n: (len(places) - n) * token_s, num_layers=layers)
    compute = (len(places) - np.arange(len(places) + 1)) * token_s
    total = np.maximum(times + compute / layers, times / layers + compute)
    assert choice.total_s == total.min() and choice.total_s == total[choice.blocks]


def test_of_two_choices_that_tie_more_is_loaded():
    assert choose_prefix(np.array([0.0, 1.0, 2.0]), lambda n: 2.0 - n).blocks == 2
    assert choose_prefix(np.array([0.0, 1.0, 3.0]), lambda n: 2.0 - n).blocks == 1


def test_a_slow_disk_is_left_alone_where_computing_is_faster():
    asked = requests([range(10)] * 2)
    slow = simulate_tiers(asked, [tier("a", 99, 1.0)], block_bytes=100, compute_s=lambda i, n: (10 - n) * 0.5)
    fast = simulate_tiers(asked, [tier("a", 99, 1e6)], block_bytes=100, compute_s=lambda i, n: (10 - n) * 0.5)
    assert slow.hits[1] == 10 and slow.loaded[1] == 0 and slow.ttft_s[1] == 5.0
    assert fast.loaded[1] == 10 and fast.ttft_s[1] < 0.01


def test_a_time_to_live_covers_short_calls_and_not_long_ones():
    assert choose_ttl_s([1, 1, 2, 500], benefit_s=5, cost_s_per_s=0.5) == 2
    assert choose_ttl_s([400, 500], benefit_s=5, cost_s_per_s=0.5) == 0
    assert choose_ttl_s([3.0], benefit_s=1, cost_s_per_s=0.5) == 0
    assert choose_ttl_s([], benefit_s=5, cost_s_per_s=0.5) == 0


def test_a_session_is_held_over_a_short_pause_and_not_over_a_long_one():
    """Two turns of every session with other prompts between them, in a tier that holds two prompts."""
    prompts, sessions, times, now = [], [], [], 0.0
    for i in range(40):
        for block, session, pause in ((i, i, 0.0), (1000 + 2 * i, -1, 1.0), (1001 + 2 * i, -1, 1.0), (i, i, 1.0)):
            now += pause
            prompts.append([block])
            sessions.append(session)
            times.append(now)
        now += 50.0
    asked = requests(prompts)._replace(arrival_s=np.array(times), session=np.array(sessions))

    def serve(cost):
        options = TierOptions(hold_cost=cost)
        return simulate_tiers(asked, [tier("a", 2, 1e9)], block_bytes=100, options=options,
                              compute_s=lambda i, n: (1 - n) * 9.0).hits.sum()  # fmt: skip

    assert serve(None) == 0 and serve(1.0) >= 38 and serve(100.0) == 0


def test_presets_say_where_their_rates_come_from():
    assert all(tier.source for preset in TIER_PRESETS.values() for tier in preset.tiers)
    blocks = np.arange(2048)
    asked = requests([blocks, blocks])
    pooled = simulate_tiers(asked, UNIFIED_POOL, block_bytes=2**21).load_s[1]
    serial = simulate_tiers(asked, SERIAL_FILES, block_bytes=2**21, options=TierOptions(serial=True, placement="in_order"))
    assert pooled < serial.load_s[1]


@pytest.mark.parametrize("seconds", [lambda n: 1.0, lambda n: np.ones(2), lambda n: np.array([3, np.nan, 1])])
def test_times_that_are_none_choose_nothing(seconds):
    with pytest.raises(ValueError, match=r"compute_s: expected seconds \[3\]"):
        choose_prefix(np.array([0.0, 1.0, 2.0]), seconds)


@pytest.mark.parametrize("arrival_s", [[5.0, 1.0], [np.nan, 1.0], [0.0, np.inf]])
def test_a_clock_that_goes_backwards_is_refused(arrival_s):
    requests = BlockRequests(np.array(arrival_s), np.array([0, 2, 4]), np.array([1, 2, 1, 2]))
    with pytest.raises(ValueError, match="arrival_s: expected seconds that do not decrease"):
        simulate_tiers(requests, [tier("host", 99, 1e9)], block_bytes=1024)


def test_refusals():
    asked = requests([[1]])
    for options in ({"retention": "mru"}, {"admission": "some"}, {"link_bytes_per_s": 0}, {"num_layers": 0}, {"hold_cost": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            TierOptions(**options)
    with pytest.raises(ValueError, match="hold_cost"):
        simulate_tiers(asked, [tier("a", 1, 1.0)], block_bytes=1, options=TierOptions(hold_cost=1.0))
    with pytest.raises(ValueError, match="offsets"):
        simulate_tiers(asked._replace(offsets=np.array([0, 2])), [tier("a", 1, 1.0)], block_bytes=1)
