"""Readers of real traces: what is written is read back, formats are known by content, every fault is named."""
import csv
import io
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pkvsim.trace_readers import load_requests, read_requests
from pkvsim.trace_summary import summary
from pkvsim.tracefile import read_trace

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "traces"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real traces are not here")

REQUESTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 3000)), min_size=1, max_size=12
)  # (arrival in ms, prompt, output)


def to_csv(header, rows):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def azure(requests, zone=""):
    start = datetime(2023, 11, 16, 18, 17, 3)
    times = [start + timedelta(milliseconds=a) for a, _, _ in requests]
    ending = zone or "0"  # the 2023 release has 7 digits and no zone, that of 2024 6 digits and a zone
    rows = [(f"{t:%Y-%m-%d %H:%M:%S.%f}{ending}", p, o) for t, (_, p, o) in zip(times, requests)]
    return to_csv(["TIMESTAMP", "ContextTokens", "GeneratedTokens"], rows)


def azure_2024(requests):
    return azure(requests, "+00:00")


def burstgpt(requests):
    header = ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"]
    return to_csv(header, [(a / 1e3, "GPT-4", p, o, p + o, "API log") for a, p, o in requests])


def vidur(requests):
    return to_csv(["arrived_at", "num_prefill_tokens", "num_decode_tokens"], [(a / 1e3, p, o) for a, p, o in requests])


def mooncake(requests, block=512):
    records = [
        {"timestamp": a, "input_length": p, "output_length": o, "hash_ids": list(range(p, p - (-p // block)))}
        for a, p, o in requests
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


def paper_csv(requests):
    return to_csv(["prompt_len", "decode_len", "arrival"], [(p, o, a) for a, p, o in requests])


def paper_json(requests):
    return json.dumps({"requests": [{"prompt": p, "decode": o, "arrival_step": a} for a, p, o in requests]}, indent=1)


WRITERS = (azure, azure_2024, burstgpt, vidur, mooncake, paper_csv, paper_json)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file whose name says nothing about its format."""
    return tmp_path_factory.mktemp("trace") / "trace.txt"


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_round_trips(file, writer, requests):
    file.write_text(writer(requests), newline="")
    trace = read_requests(file, step_s=1e-3)
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


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"a": ' * 50_000)
@example(b"[" + b"9" * 5000 + b"]")
@example(b'{"requests": [{"prompt": 1, "decode": 1}]')
@example(b'{"timestamp": 1e999, "input_length": 1, "output_length": 1, "hash_ids": [0]}')
@example(b'{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [0]}')
@example(b'{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [18446744073709551616]}')
@example(b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-02-30 00:00:00.0,1,1\n")
@example(b"TIMESTAMP,ContextTokens,GeneratedTokens\n\x00\n")
@example(b'prompt,decode\n"1\n,2')
def test_junk_raises_only_value_errors(file, junk):
    file.write_bytes(junk)
    for read in (read_requests, lambda path: read_trace(path, max_active=1, steps=1)):
        try:
            read(file)
        except ValueError as error:
            assert str(error).startswith(str(file))


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, data=st.data())
@pytest.mark.parametrize("writer", WRITERS)
def test_damaged_files_raise_only_value_errors(file, writer, requests, data):
    text = writer(requests).encode()
    at = data.draw(st.integers(0, len(text)))
    file.write_bytes(text[:at] + data.draw(st.binary(max_size=3)) + text[at + data.draw(st.integers(0, 5)) :])
    try:
        read_requests(file)
    except ValueError as error:
        assert str(error).startswith(str(file))


COLUMNS = {
    azure: ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    azure_2024: ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    burstgpt: ("Timestamp", "Request tokens", "Response tokens"),
    vidur: ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    paper_csv: ("prompt_len", "decode_len", "arrival"),
}
BAD_CELLS = st.sampled_from(
    ["", " ", "-1", "nan", "NaN", "inf", "1e400", "x", "1_0", "0x10", "--1", "\u0661", "1\u00a02", "\x1c1", "None"]
)


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, cell=BAD_CELLS, data=st.data())
@pytest.mark.parametrize("writer", COLUMNS)
def test_a_bad_cell_is_named_in_csv(file, writer, requests, cell, data):
    lines = writer(requests).splitlines()
    row = data.draw(st.integers(1, len(lines) - 1))
    column = data.draw(st.sampled_from(COLUMNS[writer]))
    cells = lines[row].split(",")
    cells[lines[0].split(",").index(column)] = cell
    lines[row] = ",".join(cells)
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        read_requests(file)
    assert str(error.value).startswith(f"{file}:{row + 1}: column {column}: expected ")
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, data=st.data())
def test_a_bad_value_is_named_in_json_lines(file, requests, data):
    records = [json.loads(line) for line in mooncake(requests).splitlines()]
    row = data.draw(st.integers(0, len(records) - 1))
    field = data.draw(st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids"]))
    wrong = [None, "x", -1, True, float("nan"), float("inf"), {}, [0.5], [True], ["a"], [2**64], "absent"]
    value = data.draw(st.sampled_from(wrong + ([] if field == "timestamp" else [1.5])))
    records[row][field] = value
    if value == "absent":
        del records[row][field]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError) as error:
        read_requests(file)
    assert str(error.value).startswith(f"{file}:{row + 1}: column {field}: ")


@settings(max_examples=30, deadline=None)
@given(requests=REQUESTS, cut=st.integers(1, 30))
@pytest.mark.parametrize("writer", [mooncake, paper_json])
def test_truncated_json_is_an_error(file, writer, requests, cut):
    text = writer(requests).rstrip()
    assume(cut < len(text) and text[-cut - 1] != "\n")
    file.write_text(text[:-cut])
    with pytest.raises(ValueError, match=r"trace.txt:\d+: "):
        read_requests(file)


BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": expected at least one request, got an empty file"),
        (" \n\n", ": expected at least one request"),
        (",,\n", ": expected at least one request"),
        ("[]", ": expected at least one request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", ": expected at least one request, got none"),
        ("a,b\n1,2\n", ":1: columns of no known trace .known are Azure LLM inference: TIMESTAMP, .*, found a, b"),
        ("\n\na,b\n1,2\n", ":3: columns of no known trace"),
        ("TIMESTAMP,Context\n", ":1: column ContextTokens, GeneratedTokens: missing for the Azure"),
        ("num_prefill_tokens\n3\n", ":1: column num_decode_tokens: missing for the vidur format, found num_"),
        (BURST + "5,ChatGPT,472,18\n", ":2: expected 6 columns, got 4: column Total tokens, Log Type missing"),
        (BURST + "5,ChatGPT,472,18,490,log,x\n", ":2: expected 6 columns, got 7"),
        (BURST + '5,"Chat\nGPT",1,1,2,log\n5,b,x,1,2,log\n', ":4: column Request tokens: expected .* got 'x'"),
        (BURST + '5,"Chat,1,1,2,log\n5,b,x,1,2,log\n', ":2: expected 6 columns, got 2"),
        (BURST + "5,a,0,0,0,log\n6,b,4,0,4,log\n", ": expected at least one request with prompt and output tokens"),
        ("prompt,decode,prompt\n1,2,3\n", ":1: column prompt: expected once"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 25:00:00.0,1,1\n", ":2: column TIMESTAMP: expected YYYY"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 10:00:00+02:00,1,1\n", ":2: column TIMESTAMP: expected"),
        ("[3]", ":1: expected an object per request, got 3"),
        ('{"x": 1}', ":1: column timestamp, input_length, output_length, hash_ids: missing for the Mooncake format"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1, 2, 3, 4]}',
         ":1: column hash_ids: expected 2 of them, one per 512 prompt tokens, got 4"),
    ],
)  # fmt: skip
def test_faults_are_named(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=f"trace.txt{message}"):
        read_requests(file)


def test_unreadable_paths(tmp_path):
    (tmp_path / "junk").write_bytes(bytes(range(256)))
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"), (tmp_path / "junk", "utf-8")):
        with pytest.raises(ValueError, match=f"{path}: cannot read: .*{why}"):
            read_requests(path)


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
    for note, word in zip(trace.notes, ("tick every 3 s", "first 100 of 200", "scaled by 2", "up to 0.5 s, seed 4")):
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


def pkvsim(*args):
    return subprocess.run([sys.executable, "-m", "pkvsim", "trace", *args], cwd=ROOT, capture_output=True, text=True)


def test_command(tmp_path):
    path = tmp_path / "day[1].csv"
    path.write_text(azure([(i * 700, 100 + i, 1 + i % 7) for i in range(50)]))
    shown = pkvsim(str(path), "--limit", "40")
    assert (shown.returncode, shown.stderr) == (0, "")
    for text in ("day[1]: 40 requests", "1.47 requests/s", "p99", "█", "note: first 40 of 50 requests"):
        assert text in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    printed = pkvsim(str(path), "--json", "--rate-scale", "2", "--jitter", "0.1", "--seed", "3")
    figures = json.loads(printed.stdout)
    assert figures["requests"] == 50 and figures["rate_per_s"] == pytest.approx(2.9, rel=0.05)
    assert printed.stdout == pkvsim(str(path), "--json", "--rate-scale", "2", "--jitter", "0.1", "--seed", "3").stdout


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_repeat(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from pkvsim.trace_plot import plot_trace

    path = tmp_path / "trace.csv"
    path.write_text(vidur([(i * 700, 100 + i, 1 + i % 7) for i in range(50)]))
    trace = read_requests(path)
    drawn = []
    for name in ("a", "b"):
        plot_trace(trace, tmp_path / f"{name}.{suffix}")
        drawn.append((tmp_path / f"{name}.{suffix}").read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0]) > 5000
    for bad, message in ((tmp_path / "x.gif", "ending in .png or .svg"), (tmp_path / "no" / "x.png", "cannot write")):
        with pytest.raises(ValueError, match=f"plot: .*{message}"):
            plot_trace(trace, bad)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.csv"], "none.csv: cannot read: No such file"),
        (["GOOD", "--rate-scale", "0"], "rate_scale: expected a number in [1e-09, 1e+09], got 0.0"),
        (["GOOD", "--jitter", "nan"], "jitter_s: expected seconds in [0, 1e+09], got nan"),
        (["GOOD", "--limit", "0"], "limit: expected an integer in [1, 2147483647], got 0"),
        (["GOOD", "--seed", "-1"], "seed: expected an integer in [0, 18446744073709551615], got -1"),
        (["GOOD", "--plot", "x.gif"], "plot: expected a file ending in .png or .svg, got 'x.gif'"),
        ([], "FILE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, args, message):
    path = tmp_path / "good.csv"
    path.write_text(vidur([(0, 1, 1), (3000, 2, 2)]))
    done = pkvsim(*(str(path) if arg == "GOOD" else arg for arg in args))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr
