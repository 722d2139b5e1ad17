"""Loads without a file: means, bounds, pairs, repeatable draws, conversations whose prompts grow, closed loops."""
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_writers import vidur

from pkvsim.traces.distributions import (
    Exponential,
    Lognormal,
    Samples,
    Uniform,
    constant,
    draw,
    draw_whole,
    parse_distribution,
    parse_think,
    parse_tokens,
    parse_turns,
)
from pkvsim.traces.requests import closed_loop, first_requests, jitter, scale_rate
from pkvsim.traces.summary import prefix_reuse, summary
from pkvsim.traces.synthetic import BLOCK_TOKENS, Gaps, make_load, parse_gaps

FIELDS = (
    "arrival_s", "prompt_tokens", "output_tokens", "block_hashes", "block_offsets", "session", "after", "think_us"
)  # fmt: skip


def same(a, b, fields=FIELDS):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)


def loads(**fixed):
    options = dict(
        input_tokens=st.sampled_from([constant(7), Uniform(1, 90), Lognormal(3, 1, 500), Samples(np.array([3.0, 40]))]),
        output_tokens=st.sampled_from([constant(1), Uniform(5, 60), Exponential(20.0)]),
        requests=st.integers(1, 60),
        rate_per_s=st.sampled_from([None, 0.5, 20.0]),
        gaps=st.sampled_from([Gaps(), Gaps(0.25), Gaps(math.inf)]),
        concurrency=st.sampled_from([None, 1, 8]),
        turns=st.sampled_from([constant(1), constant(3), Uniform(1, 6)]),
        think_s=st.sampled_from([constant(0.0), Uniform(0.5, 4.0), Exponential(2.0)]),
        shared_prefix_tokens=st.sampled_from([0, 5, 16, 100]),
        seed=st.integers(0, 2**64 - 1),
    )
    return st.fixed_dictionaries(options | {name: st.just(value) for name, value in fixed.items()})


@settings(deadline=None)
@given(loads())
def test_equal_options_make_equal_loads(options):
    load = make_load(**options)
    assert len(load) == options["requests"] and load.arrival_s[0] == 0 and load.concurrency == options["concurrency"]
    assert same(load, make_load(**options))
    if options["rate_per_s"] is None and options["turns"] == constant(1):
        assert not load.arrival_s.any()


@settings(deadline=None)
@given(loads(turns=constant(1)), st.sampled_from([0.5, 3.0]), st.integers(1, 9))
def test_how_requests_arrive_leaves_their_lengths(options, rate, concurrency):
    load = make_load(**options)
    other = make_load(**options | {"rate_per_s": rate, "gaps": Gaps(2.0), "concurrency": concurrency})
    assert same(load, other, ("prompt_tokens", "output_tokens"))
    longer = make_load(**options | {"output_tokens": constant(999)})
    assert same(load, longer, ("prompt_tokens", "arrival_s"))


@settings(deadline=None)
@given(loads())
def test_conversations_grow(options):
    """Every turn begins with all of the one before it, which the block hashes show, and waits for its end."""
    load = make_load(**options)
    prompts, outputs = load.prompt_tokens, load.output_tokens
    assert (prompts > options["shared_prefix_tokens"]).all()
    if load.block_hashes is None:
        assert load.after is None and options["shared_prefix_tokens"] < BLOCK_TOKENS
        return
    blocks = [load.block_hashes[a:b].tolist() for a, b in zip(load.block_offsets, load.block_offsets[1:])]
    after = np.full(len(load), -1) if load.after is None else load.after
    shared = options["shared_prefix_tokens"] // BLOCK_TOKENS
    for i, before in enumerate(after):
        assert blocks[i][:shared] == list(range(shared)) and len(set(blocks[i])) == len(blocks[i])
        if before < 0:
            continue
        assert load.session[i] == load.session[before]
        assert prompts[i] > prompts[before] + outputs[before]
        full = prompts[before] // BLOCK_TOKENS
        assert blocks[i][:full] == blocks[before][:full]
        assert load.arrival_s[i] == pytest.approx(load.arrival_s[before] + load.think_us[i] / 1e6, abs=1e-6)
    for i in range(len(load)):
        for j in range(i):
            common = set(blocks[i]) & set(blocks[j])
            related = load.session is not None and load.session[i] == load.session[j]
            most = min(prompts[i], prompts[j]) // BLOCK_TOKENS if related else shared
            assert len(common) == most


@settings(deadline=None)
@given(loads(), st.integers(1, 60), st.integers(0, 9))
def test_transforms_keep_who_follows_whom(options, limit, seed):
    load = make_load(**options)
    first = first_requests(load, limit)
    for moved in (first, jitter(first, 3.0, seed=seed), scale_rate(first, 2.0), closed_loop(first, 4)):
        assert (moved.after is None) == (load.after is None)
        if moved.after is None:
            continue
        key = [(s, p) for s, p in zip(moved.session, moved.prompt_tokens)]  # prompts of a conversation only grow
        assert sorted(key) == sorted(zip(load.session[: len(first)], load.prompt_tokens[: len(first)]))
        for i, before in enumerate(moved.after):
            earlier = [p for s, p in key if s == moved.session[i] and p < moved.prompt_tokens[i]]
            assert before < i and (key[before][1] == max(earlier) if before >= 0 else not earlier)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_vllms(burstiness):
    """A mean of 1 / rate and a coefficient of variation of 1 / sqrt(burstiness)."""
    options = dict(input_tokens=constant(1), output_tokens=constant(1), requests=40_000, rate_per_s=5.0)
    figures = summary(make_load(**options, gaps=Gaps(burstiness)))
    assert figures.rate_per_s == pytest.approx(5, rel=0.04)
    assert figures.interarrival_cv == pytest.approx(burstiness**-0.5, rel=0.04)
    even = make_load(**options, gaps=Gaps(math.inf))
    assert np.allclose(np.diff(even.arrival_s), 0.2)


def test_conversations_arrive_so_that_requests_have_the_rate():
    load = make_load(
        input_tokens=constant(64), output_tokens=constant(64), requests=20_000, rate_per_s=8.0, turns=constant(4)
    )
    assert load.rate_per_s == pytest.approx(8, rel=0.05)
    assert sorted(set(load.prompt_tokens.tolist())) == [64, 192, 320, 448]
    assert prefix_reuse(load) == pytest.approx((4 + 12 + 20) / (4 + 12 + 20 + 28))


def test_the_mean_is_the_one_asked_for():
    rng = np.random.default_rng(1)
    for text, mean in (("lognormal:mean=1024,p99=8192", 1024), ("lognormal:p50=300,cv=0.5", 300 * math.sqrt(1.25)),
                       ("100-2000", 1050), ("17", 17)):  # fmt: skip
        distribution = parse_tokens("input_tokens", text, "prompt_tokens")
        assert distribution.mean == pytest.approx(mean)
        tokens = draw_whole(distribution, 200_000, rng, least=1, most=10**9)
        assert tokens.mean() == pytest.approx(mean, rel=0.02) and tokens.min() >= 1
    drawn = draw(parse_distribution("x", "lognormal:mean=1024,p99=8192", least=1, most=1e9), 200_000, rng)
    assert np.quantile(drawn, 0.99) == pytest.approx(8192, rel=0.05)
    drawn = draw(parse_distribution("x", "lognormal:p50=10,p90=40,max=50", least=1, most=1e9), 200_000, rng)
    assert (np.median(drawn), np.quantile(drawn, 0.9), drawn.max()) == pytest.approx((10, 40, 50), rel=0.03)
    dice = draw_whole(parse_tokens("x", "1-6", ""), 60_000, rng, least=1, most=99)
    assert np.bincount(dice)[1:] == pytest.approx(np.full(6, 10_000), rel=0.05)


@given(st.floats(1, 1e5), st.sampled_from(["mean p99", "mean p90", "p50 p99", "p50 p90"]).map(str.split), st.data())
def test_lognormals_have_the_figures_they_were_given(middle, keys, data):
    z = {"p90": 1.2815515655446004, "p99": 2.3263478740408408}[keys[1]]
    spread = middle * data.draw(st.floats(1, math.exp(z**2 / 2) * 0.999 if keys[0] == "mean" else 20))
    found = parse_distribution("x", f"lognormal:{keys[0]}={middle!r},{keys[1]}={spread!r}", least=1, most=1e9)
    assert (found.mean if keys[0] == "mean" else math.exp(found.mu)) == pytest.approx(middle)
    assert math.exp(found.mu + z * found.sigma) == pytest.approx(spread)


def test_lengths_of_a_file_keep_their_pairs(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(vidur([(i, 10 + i, 1000 + i) for i in range(50)]))
    lengths = {
        f"{name}_tokens": parse_tokens("x", f"file:{path}", column)
        for name, column in (("input", "prompt_tokens"), ("output", "output_tokens"))
    }
    load = make_load(**lengths, requests=500, rate_per_s=1.0)
    assert (load.output_tokens - load.prompt_tokens == 990).all() and len(set(load.prompt_tokens.tolist())) > 40
    mixed = make_load(**lengths | {"output_tokens": Uniform(1, 9)}, requests=500)
    assert mixed.prompt_tokens.tolist() == load.prompt_tokens.tolist()


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_tokens, "x", "o: expected a number, a range like 100-2000, .*, file:PATH, got 'x'"),
        (parse_tokens, "0", "o: expected an integer in .1, 2147483647., got 0"),
        (parse_tokens, "1.5", "o: expected an integer in .1, 2147483647., got 1.5"),
        (parse_tokens, "9-5", "o: expected a range from low to high, got '9-5'"),
        (parse_tokens, "file:none.csv", "none.csv: cannot read: No such file"),
        (parse_tokens, "lognormal:mean=5", "o: expected lognormal: with mean= or p50=, and p90=, .*, got"),
        (parse_tokens, "lognormal:mean=5,mean=6", "o: mean: expected once"),
        (parse_tokens, "lognormal:mean=5,p99=x", "o: p99: expected a number, got 'x'"),
        (parse_tokens, "lognormal:mean=100,p99=2000", "o: p99: expected at least mean and at most 15 times it, got 2"),
        (parse_tokens, "lognormal:p50=100,p99=20", "o: p99: expected at least p50, got 20"),
        (parse_tokens, "lognormal:mean=100,cv=nan", "o: cv: expected a number in .0, 10., got nan"),
        (parse_tokens, "lognormal:mean=100,p95=200", "o: expected lognormal: with"),
        (parse_tokens, "exponential:p50=3", "o: expected exponential:mean=10 with or without max="),
        (parse_turns, "0", "o: expected an integer in .1, 10000., got 0"),
        (parse_think, "-3", "o: expected a number, a range"),
        (parse_think, "1e99", "o: expected a number in .0, 1000000000., got 1e99"),
        (parse_gaps, "uniform", "o: expected poisson, constant, or gamma:BURSTINESS like gamma:0.5, got 'uniform'"),
        (parse_gaps, "gamma:0", "o: expected poisson"),
        (parse_gaps, "gamma:nan", "o: expected poisson"),
    ],
)
def test_bad_texts_are_named(parse, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse("o", text, "prompt_tokens") if parse is parse_tokens else parse("o", text)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_named():
    good = dict(input_tokens=constant(5), output_tokens=constant(5), requests=3)
    for changes, message in (
        (dict(requests=0), "requests: expected an integer in"),
        (dict(rate_per_s=0), "rate_per_s: expected a number in"),
        (dict(concurrency=0), "concurrency: expected an integer in"),
        (dict(gaps=Gaps(0)), "burstiness: expected a number > 0"),
        (dict(shared_prefix_tokens=-1), "shared_prefix_tokens: expected an integer in"),
        (dict(input_tokens=constant(2**30), turns=constant(3)), "input_tokens: expected at most 2147483647 tokens in"),
    ):
        with pytest.raises(ValueError, match=message):
            make_load(**good | changes)
    chat = make_load(**good, turns=constant(3))
    for changes, message in (
        (dict(after=np.array([0, 0, 1])), "after: expected -1 or the index of an earlier request"),
        (dict(think_us=None), "after, think_us: expected both or neither"),
        (dict(think_us=np.array([0.0, -1, 0])), "think_us: expected finite numbers >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(chat, **changes)
