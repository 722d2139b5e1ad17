"""Readers of real traces: what is written is read back, formats are known by content."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from paths import SHARED
from trace_writers import BURST, REQUESTS, WRITERS, mooncake, to_csv

from pkvsim.traces.readers import load_requests, read_requests
from pkvsim.traces.summary import summary

REAL = SHARED / "traces"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real traces are not here")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file whose name says nothing about its format."""
    return tmp_path_factory.mktemp("trace") / "trace.txt"


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_round_trips(file, writer, requests):
    file.write_text(writer(requests), newline="")
    trace = read_requests(file, step_s=1e-3, time_unit="ms" if writer is mooncake else None)
    ordered = sorted(requests, key=lambda r: r[0])  # stable, as the reader's
    assert trace.prompt_tokens.tolist() == [p for _, p, _ in ordered]
    assert trace.output_tokens.tolist() == [o for _, _, o in ordered]
    assert np.allclose(trace.arrival_s, [(a - ordered[0][0]) / 1e3 for a, _, _ in ordered], atol=1e-9)
    assert trace.arrival_s[0] == 0 and trace.name == "trace"
    assert ("requests were not in order of arrival: sorted" in trace.notes) == (ordered != requests)
    if writer is mooncake:
        assert trace.block_tokens == 512
        firsts = trace.block_hashes[trace.block_offsets[:-1]]
        assert firsts.tolist() == trace.prompt_tokens.tolist()


def test_failed_requests_are_left_out_with_a_note(file):
    file.write_text(BURST + "5,GPT-4,472,18,490,API log\n6,GPT-4,9,0,9,API log\n7.5,GPT-4,0,0,0,API log\n9,x,1,2,3,y\n")
    trace = read_requests(file)
    assert trace.arrival_s.tolist() == [0, 4] and trace.prompt_tokens.tolist() == [472, 1]
    assert trace.notes == ("2 requests without prompt or output tokens (failed) left out",)


def test_vidur_without_arrivals(file):
    header = ("num_prefill_tokens", "num_decode_tokens", "num_total_tokens", "pd_ratio")
    file.write_text(to_csv(header, [(3772, 54, 3826, 69.85), (2015, 156, 2171, 12.9)]))
    trace = read_requests(file)
    assert trace.arrival_s.tolist() == [0, 0] and trace.output_tokens.tolist() == [54, 156]
    assert trace.notes == ("no arrival times: all requests arrive at 0 s",)


@given(requests=REQUESTS)
def test_other_block_sizes(file, requests):
    assume(any(p > 1024 for _, p, _ in requests))
    file.write_text(mooncake(requests, block=64))
    trace = read_requests(file)
    assert trace.block_tokens == 64 and "hash_ids taken as one per 64 prompt tokens" in trace.notes


def test_seven_fractional_digits_are_kept(file):
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,1,1\n2023-11-16 18:17:03.9799601,1,1\n"
    )
    assert read_requests(file).arrival_s.tolist() == [0, 1e-7]


def test_load_requests_applies_every_transform(file):
    file.write_text(mooncake([(3000 * (i // 5), 600 + i, 5) for i in range(200)]))
    trace = load_requests(file, rate_scale=2, jitter_s=0.5, limit=100, seed=4)
    assert len(trace) == 100 and trace.duration_s == pytest.approx(30, abs=2)
    words = ("as milliseconds", "tick every 3 s", "first 100 of 200", "scaled by 2", "up to 0.5 s, seed 4")
    for note, word in zip(trace.notes, words):
        assert word in note
    again = load_requests(file, rate_scale=2, jitter_s=0.5, limit=100, seed=4)
    assert again.arrival_s.tobytes() == trace.arrival_s.tobytes()
    with pytest.raises(ValueError, match="step_s: expected seconds > 0"):
        load_requests(file, step_s=0)


@needs_real
def test_mooncake_conversation():
    figures = summary(read_requests(REAL / "mooncake_conversation.jsonl"))
    assert (figures.requests, figures.prompt_blocks, figures.block_tokens) == (12031, 288500, 512)
    assert [round(x) for x in (figures.prompt.p50, figures.prompt.p90, figures.prompt.p99)] == [6909, 27367, 85400]
    assert [round(x + 1e-9) for x in (figures.output.p50, figures.output.p90, figures.output.p99)] == [350, 597, 1119]
    assert (figures.prompt.max, figures.output.max) == (126195, 2000)
    assert round(figures.rate_per_s, 2) == 3.40 and figures.tick_s == pytest.approx(3, abs=0.003)
    assert round(100 * figures.prefix_reuse, 1) == 36.6
    spread = summary(load_requests(REAL / "mooncake_conversation.jsonl"))
    assert spread.interarrival_cv == pytest.approx(1, abs=0.05) and spread.prefix_reuse == figures.prefix_reuse


@needs_real
def test_azure_code():
    figures = summary(load_requests(REAL / "azure2023_code.csv"))
    assert figures.requests == 8819 and figures.notes == ()
    assert [round(x) for x in (figures.prompt.p50, figures.prompt.p90, figures.prompt.p99)] == [1469, 5188, 7436]
    assert [round(x) for x in (figures.output.p50, figures.output.p90, figures.output.p99)] == [13, 55, 251]
    assert (figures.prompt.max, figures.output.max) == (7437, 1899)
    assert round(figures.rate_per_s, 2) == 2.57 and round(figures.interarrival_cv, 1) == 13.2
