"""Trace files as people bring them: each format's real columns, units, zones, gaps, compression, and limits."""
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from trace_writers import azure, mooncake, vidur

import pkvsim.traces.rows as rows_module
from pkvsim.traces.prompt_hashes import whole_hashes
from pkvsim.traces.readers import LOOKAHEAD, load_requests, read_requests
from pkvsim.traces.summary import summary
from pkvsim.traces.time_units import decide_unit

INPUTS = Path(__file__).parent / "inputs"
ARRIVALS = {  # file: seconds of the first arrivals, prompt and output tokens of the first request, requests
    "aiperf.jsonl": ([0, 0.1, 0.2], 2, 4, 3),
    "azure.csv.gz": ([0, 0.5, 1.0], 100, 10, 60),
    "azure_float.csv": ([0, 1], 100, 10, 2),
    "azure_tz.csv": ([0, 0.5, 1.0], 100, 10, 60),
    "bailian.jsonl": ([0, 1.386, 60], 521, 132, 3),
    "llmservingsim.jsonl": ([0, 1, 2], 128, 10, 3),
    "long1.csv": ([0], 60000, 128, 1),
    "moon_delay.jsonl": ([0, 3, 6, 9, 12, 12.5, 18], 6758, 500, 20),
    "moon_nohash.jsonl": ([0, 3, 6], 6758, 500, 20),
    "moon_seconds.jsonl": ([0, 0.5, 1], 1000, 50, 20),
    "moon_short_hash.jsonl": ([0, 3, 6], 6758, 500, 20),
    "moon_u64hash.jsonl": ([0, 3, 6], 1000, 50, 5),
    "nonchained.jsonl": ([0, 60, 120], 1536, 5, 3),
    "one.csv": ([0], 1024, 128, 1),
    "own3.csv": ([0, 0.02, 0.04], 1000, 100, 3),
    "samehash.jsonl": ([0, 60], 2048, 5, 2),
    "sharegpt.json": ([0], 1, 1, 1),
    "slide.csv": ([0, 0, 0], 15000, 400, 32),
    "splitwise.csv": ([0, 0.3], 374, 44, 2),
}
REUSE = {
    "bailian.jsonl": 3 / 38,  # 33, 2 and 3 blocks of 16 tokens; the third request repeats its parent's first three
    "moon_delay.jsonl": 19 / 20,
    "moon_short_hash.jsonl": (19 * 14 - 1) / (20 * 14),  # one of them names 13 of its 14 blocks
    "moon_u64hash.jsonl": 0,  # the second block repeats, the first never does
    "nonchained.jsonl": 3 / 9,
    "samehash.jsonl": 4 / 8,
}


@pytest.mark.parametrize("name", sorted(ARRIVALS))
def test_inputs_from_the_wild(name):
    arrivals, prompt, output, requests = ARRIVALS[name]
    trace = load_requests(INPUTS / name)
    assert trace.arrival_s[: len(arrivals)].tolist() == pytest.approx(arrivals)
    assert (trace.prompt_tokens[0], trace.output_tokens[0], len(trace)) == (prompt, output, requests)
    assert trace.name == name.split(".")[0]
    if name in REUSE:
        assert summary(trace).prefix_reuse == pytest.approx(REUSE[name])
    assert set(ARRIVALS) == {path.name for path in INPUTS.iterdir()}


def test_what_was_decided_is_said_and_can_be_overridden():
    for name, said in (("bailian.jsonl", "seconds: fractions"), ("moon_nohash.jsonl", "milliseconds: whole numbers")):
        assert f"timestamps taken as {said}" in read_requests(INPUTS / name).notes[0]
    assert read_requests(INPUTS / "bailian.jsonl", time_unit="ms").duration_s == pytest.approx(0.06)
    assert read_requests(INPUTS / "moon_nohash.jsonl", time_unit="s").duration_s == 57000
    own = INPUTS / "own3.csv"
    assert "taken as 0.02 s each, an assumption" in read_requests(own).notes[0]
    assert read_requests(own, time_unit="s").arrival_s.tolist() == [0, 1, 2]
    assert read_requests(own, step_s=0.5).arrival_s.tolist() == [0, 0.5, 1]
    assert read_requests(INPUTS / "splitwise.csv", time_unit="steps", step_s=1).arrival_s.tolist() == [0, 0.3]
    for text in ("sharegpt.json", "aiperf.jsonl"):
        assert any("estimated from text, 4 bytes each (an assumption)" in x for x in read_requests(INPUTS / text).notes)
    with pytest.raises(ValueError, match="time_unit: expected one of s, ms, us, ns, steps, got 'h'"):
        read_requests(own, time_unit="h")
    with pytest.raises(ValueError, match="time_unit: .* has dates and times"):
        read_requests(INPUTS / "azure_tz.csv", time_unit="s")


@settings(deadline=None)
@given(st.integers(5, 60), st.floats(0.3, 100), st.integers(0, 99), st.sampled_from([0, 1.7e9]))
def test_units_are_decided_by_value(count, rate, seed, origin):
    """Traces of usual rates, as Mooncake (whole milliseconds) and Bailian (seconds with fractions) write them."""
    seconds = origin + np.cumsum(np.random.default_rng(seed).uniform(0.8, 1.2, count)) / rate
    assert decide_unit(np.floor(seconds * 1e3))[0] == "ms"
    assert decide_unit(np.round(seconds, 3))[0] == "s" or (np.round(seconds, 3) % 1 == 0).all()
    if origin:
        assert decide_unit(seconds * 1e6)[0] == "us" and decide_unit(seconds * 1e9)[0] == "ns"


@pytest.mark.parametrize(("times", "unit"), [
    (np.floor(np.linspace(0, 250, 50)), "s"), (np.floor(np.linspace(0, 251, 50)), "ms"),
    (0.5 + np.linspace(0, 480, 16), "s"), (0.5 + np.linspace(0, 481, 16), "ms")])  # fmt: skip
def test_the_least_rates_of_seconds(times, unit):
    """0.2 requests/s of whole numbers, one in 30 s of fractions; and just less."""
    assert decide_unit(times)[0] == unit


def test_hashes_of_full_blocks_alone_tell_the_block_too():
    prompt = np.array([200, 330, 70])
    hashes, offsets, size, notes = whole_hashes("f", np.arange(3), prompt, np.arange(9), prompt // 64)
    assert size == 64 and np.diff(offsets).tolist() == [4, 6, 2]
    assert hashes.tolist() == [0, 1, 2, 12, 3, 4, 5, 6, 7, 18, 8, 20] and "3; the rest" in notes[-1]


def test_of_two_block_sizes_one_that_no_prompt_has_too_many_hashes_for():
    """Each explains one of the prompts: by 512 tokens the other would have three hashes too many."""
    assert whole_hashes("f", np.arange(2), np.array([512, 600]), np.arange(6), np.array([1, 5]))[2] == 128


@pytest.mark.parametrize("highest", [7, 2**63 - 1])
def test_blocks_without_a_hash_are_nobody_elses(highest):
    """Also where the first prompt has none, and where no number is left above the given ones."""
    given = np.array([1, 2, 1, 2, highest, 1])
    prompt = np.array([512, 1024, 1536, 512])
    hashes, offsets, size, _ = whole_hashes("f", np.arange(4), prompt, given, np.array([0, 2, 3, 1]))
    assert size == 512 and offsets.tolist() == [0, 1, 3, 6, 7] and hashes.dtype == np.int64
    own, *rest = hashes.tolist()
    assert own not in rest and [rest.index(one) for one in rest] == [0, 1, 0, 1, 4, 0]


def test_blocks_of_token_ids_cover_what_is_before_them(tmp_path):
    path, same = tmp_path / "a.jsonl", list(range(16))
    ids = [same + same, [9] * 16 + same, same + same]
    path.write_text("\n".join(json.dumps({"arrival_time_ns": at, "input_toks": 32, "output_toks": 1, "input_tok_ids": own})
                              for at, own in enumerate(ids)))
    first, second, third = read_requests(path).block_hashes.reshape(3, 2).tolist()
    assert first == third and len({*first, *second}) == 4


@pytest.mark.parametrize("limit", [2, 3, 4])
def test_only_what_has_more_is_said_to_be_cut(tmp_path, limit):
    path = tmp_path / "a.jsonl"
    path.write_text(mooncake([(1000 * at, 600, 5) for at in range(3)]))
    trace = read_requests(path, limit=limit)
    assert len(trace) == min(limit, 3) and any("only the first" in note for note in trace.notes) == (limit < 3)


@pytest.mark.parametrize("zone", ["+08:00", "-0330", "Z", " UTC", "+00"])
def test_zones(tmp_path, zone):
    path = tmp_path / "a.csv"
    path.write_text(azure([(0, 5, 1), (1500, 6, 1)], zone))
    assert read_requests(path).arrival_s.tolist() == pytest.approx([0, 1.5])
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 08:00:00+08:00,1,1\n2024-05-10 00:00:01Z,2,2\n"
        "2024-05-09 20:30:02.5-03:30,3,3\n"
    )
    assert read_requests(path).arrival_s.tolist() == pytest.approx([0, 1, 2.5])


def test_compressed_files_and_standard_input(tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    plain = mooncake([(3000 * i, 600 + i, 5) for i in range(50)]).encode()
    (tmp_path / "plain.jsonl").write_bytes(b"\xef\xbb\xbf" + plain)
    expected = read_requests(tmp_path / "plain.jsonl")
    written = {
        "a.jsonl.gz": gzip.compress(plain),
        "no_suffix": gzip.compress(plain[:999]) + gzip.compress(plain[999:]),
        "b.jsonl.zst": zstd.compress(plain[:999]) + zstd.compress(plain[999:]),
    }
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
        trace = read_requests(tmp_path / name)
        assert trace.prompt_tokens.tolist() == expected.prompt_tokens.tolist() and trace.name == name.split(".")[0]
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name}: cannot read: "):
            read_requests(tmp_path / name)
    command = [sys.executable, "-m", "pkvsim", "trace", "-", "--json"]
    for data in (plain, written["a.jsonl.gz"]):
        done = subprocess.run(command, cwd=ROOT, input=data, capture_output=True)
        figures = json.loads(done.stdout)
        assert (figures["requests"], figures["name"]) == (50, "stdin") and figures["duration_s"] == 147
    done = subprocess.run(command, cwd=ROOT, input=b"x", capture_output=True)
    assert done.returncode == 2 and b"standard input:1: columns of no known trace" in done.stderr


def test_sessions_of_llmservingsim(tmp_path):
    """Their documented example: a session of three calls, and a request of its own."""
    calls = [
        {"input_toks": 33, "output_toks": 7, "tool_duration_ns": 10**9, "input_tok_ids": list(range(33))},
        {"input_toks": 50, "output_toks": 8, "tool_duration_ns": 2 * 10**9, "input_tok_ids": list(range(50))},
        {"input_toks": 70, "output_toks": 9},
    ]
    records = [
        {"session_id": "s", "arrival_time_ns": 10**9, "sub_requests": calls},
        {"input_toks": 5, "output_toks": 6, "arrival_time_ns": 15 * 10**8},
    ]
    path = tmp_path / "agents.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    trace = read_requests(path)
    assert trace.prompt_tokens.tolist() == [33, 5, 50, 70] and trace.arrival_s.tolist() == [0, 0.5, 1, 3]
    assert trace.after.tolist() == [-1, -1, 0, 2] and trace.think_us.tolist() == [0, 0, 1e6, 2e6]
    assert trace.session.tolist() == [0, -1, 0, 0] and trace.block_tokens == 16
    first, second = (trace.block_hashes[trace.block_offsets[i] :].tolist() for i in (0, 2))
    assert first[:2] == second[:2] and first[2] != second[2]  # two full blocks of 16 are shared
    figures = summary(trace)
    assert (figures.sessions, figures.follow_ups) == (1, 2)


def test_measured_requests(tmp_path):
    """Per-request results of AIPerf and of vLLM's benchmark are traces too."""
    path = tmp_path / "profile_export.jsonl"
    metrics = {"input_sequence_length": {"value": 550, "unit": "tokens"}, "output_sequence_length": {"value": 9}}
    records = [{"metadata": {"request_start_ns": 1759813207532900363 + i * 10**9}, "metrics": metrics} for i in (0, 2)]
    path.write_text("\n".join(map(json.dumps, records)))
    trace = read_requests(path)
    assert trace.arrival_s.tolist() == pytest.approx([0, 2], abs=1e-5) and trace.prompt_tokens.tolist() == [550, 550]
    path.write_text(json.dumps({"date": "x", "input_lens": [5, 6], "output_lens": [1, 2], "start_times": [7.5, 8]}))
    trace = read_requests(path)
    assert trace.arrival_s.tolist() == [0, 0.5] and trace.output_tokens.tolist() == [1, 2] and not trace.notes
    # SGLang's benchmark appends every run to one file.
    path.write_text('{"input_lens": [5, 6], "output_lens": [1, 2]}\n{"input_lens": [7], "output_lens": [3]}\n')
    trace = read_requests(path)
    assert trace.prompt_tokens.tolist() == [5, 6, 7] and "2 results in the file, taken as one trace" in trace.notes


def test_a_limit_stops_reading(tmp_path):
    requests = [(3000 * (i // 5), 600 + i, 5) for i in range(3 * LOOKAHEAD)]
    path = tmp_path / "long.jsonl"
    path.write_text(mooncake(requests) + "this line is never read")
    with pytest.raises(ValueError, match="Expecting value"):
        load_requests(path)
    some = load_requests(path, limit=100, seed=3)
    path.write_text(mooncake(requests))
    whole = load_requests(path, seed=3)
    assert some.arrival_s.tobytes() == whole.arrival_s[:100].tobytes()
    assert some.prompt_tokens.tolist() == whole.prompt_tokens[:100].tolist()
    assert f"only the first {LOOKAHEAD:,} requests of the file were read" in some.notes[0]
    assert len(read_requests(path, limit=5)) == 5 and len(load_requests(path, limit=2 * LOOKAHEAD)) == 2 * LOOKAHEAD
    path.write_text(vidur([(i, i % 2, 1) for i in range(50)]))
    assert len(read_requests(path, limit=10)) == 10  # failed requests do not count


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 3000)), min_size=1, max_size=12),
    st.integers(1, 300),
    st.sampled_from(["lines", "array", "indented", "wrapped"]),
)
def test_windows_do_not_matter(requests, window, layout):
    """A JSON text read a few characters at a time gives what it gives in one piece."""
    records = [json.loads(line) for line in mooncake(requests).splitlines()]
    text = {
        "lines": "\n".join(map(json.dumps, records)),
        "array": json.dumps(records),
        "indented": json.dumps(records, indent=1),
        "wrapped": json.dumps({"requests": records, "more": [1]}),
    }[layout]

    class Source:
        name = "text"
        read = io.StringIO(text).read

    window_before = rows_module.WINDOW
    rows_module.WINDOW = max(window, 20)
    try:
        found = list(rows_module.json_rows(Source()))
    finally:
        rows_module.WINDOW = window_before
    assert [record for _, record in found] == records
    if layout == "lines":
        assert [line for line, _ in found] == list(range(1, len(records) + 1))
    if layout == "indented":  # each begins after the last line of the one before it
        ends = [len(json.dumps(record, indent=1).splitlines()) for record in records]
        assert [line for line, _ in found] == (2 + np.append(0, np.cumsum(ends))[:-1]).tolist()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the standard library reads .zst")
def test_what_zst_needs_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "backports", None)
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd1234")
    with pytest.raises(ValueError, match="a.zst: before Python 3.14 a .zst file needs `pip install backports.zstd`"):
        read_requests(tmp_path / "a.zst")
