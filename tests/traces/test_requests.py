"""Request traces: what they refuse, transforms that keep every request whole, and their figures."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.traces.requests import RequestTrace, first_requests, jitter, scale_rate, spread_ticks, tick_s
from pkvsim.traces.summary import prefix_reuse, summary

BLOCK = 16


@st.composite
def traces(draw):
    gaps = draw(st.lists(st.floats(0, 100), min_size=1, max_size=30))
    n = len(gaps)
    tokens = st.lists(st.integers(1, 90), min_size=n, max_size=n)
    prompt, output = draw(tokens), draw(tokens)
    blocks = [-(-p // BLOCK) for p in prompt]
    ids = draw(st.lists(st.integers(0, 40), min_size=sum(blocks), max_size=sum(blocks)))
    offsets = np.append(0, np.cumsum(blocks))
    return RequestTrace("t", np.cumsum(gaps), prompt, output, np.array(ids, np.int64), offsets, BLOCK)


def rows(trace):
    """Every request as (prompt, output, hashes)."""
    ends = zip(trace.block_offsets, trace.block_offsets[1:])
    blocks = [tuple(trace.block_hashes[a:b].tolist()) for a, b in ends]
    return list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), blocks))


def same(a, b):
    names = ("arrival_s", "prompt_tokens", "output_tokens", "block_hashes", "block_offsets")
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in names) and a.notes == b.notes


@given(traces(), st.floats(0.01, 100))
def test_rate_scales_every_gap(trace, factor):
    scaled = scale_rate(trace, factor)
    gaps = np.diff(scaled.arrival_s) * factor
    assert np.allclose(gaps, np.diff(trace.arrival_s), atol=1e-6 * (1 + trace.arrival_s[-1]))
    assert scaled.arrival_s[0] == trace.arrival_s[0] and rows(scaled) == rows(trace)
    assert factor == 1 or "arrival rate scaled" in scaled.notes[-1]


@given(traces(), st.floats(0.001, 50), st.integers(0, 2**32))
def test_jitter_moves_requests_and_keeps_them_whole(trace, jitter_s, seed):
    moved = jitter(trace, jitter_s, seed=seed)
    assert sorted(rows(moved)) == sorted(rows(trace))
    # Sorting cannot move order statistics by more than the largest single move.
    assert np.abs(moved.arrival_s - trace.arrival_s).max() <= jitter_s * (1 + 1e-9)
    assert moved.arrival_s[0] >= trace.arrival_s[0]
    assert same(moved, jitter(trace, jitter_s, seed=seed))


@given(traces(), st.integers(1, 40))
def test_first_requests(trace, limit):
    first = first_requests(trace, limit)
    assert rows(first) == rows(trace)[:limit]
    assert first.arrival_s.tolist() == trace.arrival_s.tolist()[:limit]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=16, max_size=40), st.sampled_from([0.5, 3.0, 60.0]), st.integers(0, 99))
def test_ticks_are_spread_within_themselves(counts, tick, seed):
    wobble = np.random.default_rng(seed).uniform(-0.001, 0.001, len(counts)) * tick
    times = np.repeat(np.arange(len(counts)) * tick + wobble - wobble[0], counts)
    trace = RequestTrace("t", times, np.arange(1, len(times) + 1), np.ones(len(times), np.int64))
    spread = spread_ticks(trace, seed=seed)
    if sum(c for c in counts if c > 1) < 0.1 * len(times):
        assert spread is trace
        return
    assert tick_s(trace) == pytest.approx(tick, rel=0.01)
    assert (spread.prompt_tokens == trace.prompt_tokens).all()
    late = spread.arrival_s - trace.arrival_s
    assert (late >= 0).all() and (late <= tick * 1.002).all()
    ends = np.append(np.unique(times)[1:], np.inf)
    assert (spread.arrival_s <= np.repeat(ends, counts)).all()
    assert "timestamps tick every" in spread.notes[0] and f"seed {seed}" in spread.notes[0]
    assert spread.arrival_s.tobytes() == spread_ticks(trace, seed=seed).arrival_s.tobytes()
    assert spread.arrival_s.tobytes() != spread_ticks(trace, seed=seed + 1).arrival_s.tobytes()


def test_fine_timestamps_stay():
    rng = np.random.default_rng(0)
    poisson = np.cumsum(rng.exponential(0.3, 2000))
    bursts = np.sort(np.repeat(poisson[:200], 5))  # many equal timestamps, on no grid
    at_once, by_hand = np.zeros(50), np.repeat(np.arange(10.0), 3)
    for times in (poisson, bursts, at_once, by_hand):
        trace = RequestTrace("t", times, np.ones(len(times), np.int64), np.ones(len(times), np.int64))
        assert tick_s(trace) is None and spread_ticks(trace) is trace


def test_a_tick_before_a_long_pause_is_no_longer_than_others():
    """Ticks of 3 s, then nothing for 27 s: what came at the last tick before is spread over 3 s."""
    times = np.repeat(np.append(np.arange(20) * 3.0, 84.0), 50)
    trace = RequestTrace("t", times, np.ones(len(times), np.int64), np.ones(len(times), np.int64))
    late = spread_ticks(trace).arrival_s - times
    assert 2.5 < late[19 * 50 : 20 * 50].max() <= 3.0


def test_a_conversation_is_moved_as_one():
    """Each turn by as much as the first, also where a turn follows one that follows another."""
    n = 12
    turns = RequestTrace("t", np.arange(n) * 100.0, np.ones(n, np.int64), np.ones(n, np.int64),
                         after=np.arange(n) % 4 - 1 + np.arange(n) // 4 * 4 * (np.arange(n) % 4 > 0), think_us=np.zeros(n))
    moves = (jitter(turns, 5.0, seed=1).arrival_s - turns.arrival_s).reshape(3, 4)
    assert np.allclose(moves[1:], moves[1:, :1]) and len(np.unique(np.round(moves[1:], 9))) == 2


def test_spread_ticks_leave_no_burst():
    """Poisson arrivals seen through a clock of 3 s look like bursts (CV 3) and come back as Poisson (CV 1)."""
    times = np.floor(np.cumsum(np.random.default_rng(2).exponential(0.3, 20000)) / 3) * 3
    trace = RequestTrace("t", times, np.ones(len(times), np.int64), np.ones(len(times), np.int64))
    assert summary(trace).interarrival_cv > 2.9
    assert summary(spread_ticks(trace)).interarrival_cv == pytest.approx(1, abs=0.03)


@given(traces())
def test_summary(trace):
    figures = summary(trace)
    assert figures.requests == len(trace) and figures.duration_s == trace.arrival_s[-1] - trace.arrival_s[0]
    for tokens, lengths in ((trace.prompt_tokens, figures.prompt), (trace.output_tokens, figures.output)):
        assert (lengths.total, lengths.max) == (tokens.sum(), tokens.max())
        assert lengths.p50 == np.median(tokens) and lengths.p50 <= lengths.p90 <= lengths.p99 <= lengths.max
        assert sum(lengths.bin_counts) == len(trace) and len(lengths.bin_edges) == len(lengths.bin_counts) + 1
        for low, high, count in zip(lengths.bin_edges, lengths.bin_edges[1:], lengths.bin_counts):
            assert count == ((tokens >= low) & (tokens < high)).sum() and high == 2 * low


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=20))
def test_prefix_reuse_is_what_an_infinite_cache_hits(prompts):
    """Prompts as block contents; a hash names a block and everything before it."""
    names, hashes, hits, seen = {}, [], 0, set()
    for prompt in prompts:
        prefixes = [tuple(prompt[: i + 1]) for i in range(len(prompt))]
        hits += sum(prefix in seen for prefix in prefixes)
        seen.update(prefixes)
        hashes += [names.setdefault(prefix, len(names)) for prefix in prefixes]
    lengths = np.array([len(p) for p in prompts])
    offsets = np.append(0, np.cumsum(lengths))
    trace = RequestTrace("t", np.zeros(len(prompts)), lengths * BLOCK, lengths, np.array(hashes), offsets, BLOCK)
    assert prefix_reuse(trace) == pytest.approx(hits / len(hashes))


def test_figures_that_do_not_exist_are_none():
    trace = RequestTrace("t", np.zeros(2), np.array([5, 6]), np.array([1, 2]))
    figures = summary(trace)
    assert (figures.rate_per_s, figures.interarrival_cv, figures.tick_s, figures.prefix_reuse) == (None,) * 4
    assert summary(RequestTrace("t", [1.0], [5], [6])).interarrival_cv is None


GOOD = dict(name="t", arrival_s=[0.0, 1.0], prompt_tokens=[20, 5], output_tokens=[1, 2])
HASHED = dict(GOOD, block_hashes=[1, 2, 1], block_offsets=[0, 2, 3], block_tokens=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arrival_s=[]), "arrival_s: expected at least one request"),
        (dict(arrival_s=[1.0, 0.5]), "arrival_s: expected finite, non-decreasing"),
        (dict(arrival_s=[0.0, np.nan]), "arrival_s: expected finite"),
        (dict(arrival_s=["a", "b"]), r"arrival_s: expected float64 \[n\], got <U1 \[2\]"),
        (dict(prompt_tokens=[20]), r"prompt_tokens: expected int64 \[2\], got int64 \[1\]"),
        (dict(prompt_tokens=[20.0, 5.0]), r"prompt_tokens: expected int64 \[2\], got float64 \[2\]"),
        (dict(prompt_tokens=[20, 0]), r"prompt_tokens: expected lengths in \[1, 2147483647\], got 0 to 20"),
        (dict(output_tokens=[1, 2**31]), "output_tokens: expected lengths"),
        (dict(block_hashes=None), "block_hashes, block_offsets: expected both or neither"),
        (dict(block_tokens=0), "block_tokens: expected an integer"),
        (dict(block_offsets=[0, 1, 3]), "block_offsets: expected one hash per 16 prompt tokens"),
        (dict(block_hashes=[1, 2]), "block_hashes: expected 3 hashes, got 2"),
    ],
)
def test_bad_traces(changes, message):
    assert len(RequestTrace(**HASHED)) == 2
    with pytest.raises(ValueError, match=message):
        RequestTrace(**{**HASHED, **changes})


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda t: scale_rate(t, 0), "rate_scale: expected a number in .1e-09, 1e.09., got 0"),
        (lambda t: scale_rate(t, float("nan")), "rate_scale: expected"),
        (lambda t: jitter(t, -1), "jitter_s: expected seconds in .0, 1e.09., got -1"),
        (lambda t: jitter(t, 1.0, seed=-1), "seed: expected an integer in .0, 18446744073709551615., got -1"),
        (lambda t: jitter(t, float("inf")), "jitter_s: expected"),
        (lambda t: first_requests(t, 0), "limit: expected an integer in .1, 2147483647., got 0"),
    ],
)
def test_bad_transforms(transform, message):
    with pytest.raises(ValueError, match=message):
        transform(RequestTrace(**GOOD))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=12))
def test_prefix_reuse_is_what_serving_hits(prompts):
    """Hashes that name no whole prefix, and repeat within a prompt: both count hits up to the first miss."""
    from serving_cases import DEVICE, MODEL

    from pkvsim.serving.server_config import ServingConfig
    from pkvsim.serving.simulate import simulate

    offsets = np.append(0, np.cumsum([len(prompt) for prompt in prompts]))
    trace = RequestTrace(
        "t", np.arange(len(prompts)) * 60.0, np.diff(offsets) * BLOCK, np.ones(len(prompts), np.int64),
        np.concatenate(prompts), offsets, BLOCK,
    )  # fmt: skip
    result = simulate(trace, MODEL, DEVICE, "balanced", ServingConfig(prefix_cache="infinite"))
    assert prefix_reuse(trace) == pytest.approx(result.requests.hit_blocks.sum() / len(trace.block_hashes))
