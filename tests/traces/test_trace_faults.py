"""Faults of trace files: junk, damage and every wrong cell end in an error that names file, line and column."""
import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from trace_writers import (
    BURST,
    REQUESTS,
    WRITERS,
    azure,
    azure_2024,
    burstgpt,
    mooncake,
    paper_csv,
    paper_json,
    vidur,
)  # fmt: skip

from pkvsim.traces.paper_files import read_trace
from pkvsim.traces.readers import read_requests


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file whose name says nothing about its format."""
    return tmp_path_factory.mktemp("trace") / "trace.txt"


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
    wrong = ["x", -1, True, float("nan"), float("inf"), {}, [0.5], [True], ["a"], [2**64], [-(2**63) - 1]]
    if field in ("input_length", "output_length") or (field == "timestamp" and len(records) > 1):
        wrong += [None]  # a file may well have no hashes, and no arrival times at all
    value = data.draw(st.sampled_from(wrong + ([] if field == "timestamp" else [1.5])))
    records[row][field] = value
    if value is None and field != "timestamp" and data.draw(st.booleans()) and row > 0:
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
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 10:00:00+02:75,1,1\n", ":2: column TIMESTAMP: expected"),
        ("[3]", ":1: expected an object per request, got 3"),
        ('{"x": 1}', ":1: columns of no known trace .known are Azure LLM inference: .*, found x"),
        ('{"timestamp": 0, "output_length": 1}', ":1: column input_length: missing for the Mooncake format, found"),
        (2 * '{"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1, 2]}\n' +
         '{"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1, 2, 3]}',
         ":3: column hash_ids: expected 2 of them, one per 512 prompt tokens, got 3"),
        ('{"input_length": 9, "output_length": 1, "timestamp": 5}\n{"input_length": 9, "output_length": 1}',
         ":2: column timestamp: expected a number >= 0, or a delay after an earlier request, got nothing"),
        ('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [-1]}\n'
         '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [18446744073709551615]}',
         ":2: column hash_ids: expected all of them signed or all unsigned 64-bit integers, got both"),
        ('{"conversations": 3}', ":1: column conversations: expected a list of from and value, got 3"),
        ('{"session_id": "a", "sub_requests": 3}', ":1: column sub_requests: expected a list of objects, got 3"),
        ('{"input_lens": [1], "output_lens": [1, 2]}', ":1: column input_lens, .*: expected lists of equal length"),
        ('{"input_lens": [1], "output_lens": ["x"]}', ":1: column output_lens: expected an integer in .* got 'x'"),
        ('{"timestamp": 0, "input_length": 9, "output_length": 1}\n'
         '{"timestamp": 1e300, "input_length": 9, "output_length": 1}',
         r":2: column timestamp: expected arrivals within 1e\+10 s of each other, got 1e\+297 s"),
        ('{"prompt": 1, "prompt_len": 1, "decode": 1}', ":1: column prompt_len or prompt: expected one of them"),
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


KEYS = (
    "timestamp input_length output_length hash_ids delay session_id text_input messages arrival_time_ns input_toks "
    "output_toks input_tok_ids sub_requests conversations input_lens output_lens start_times metrics metadata "
    "prompt decode arrival request_start_ns input_sequence_length output_sequence_length value content tool_duration_ns"
).split()
JUNK = st.recursive(
    st.sampled_from([None, True, -1, 0, 1, 2.5, 1e300, float("nan"), "x", "", 2**63, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=9), min_size=1, max_size=4))
@example([{"input_length": 1, "output_length": 1, "hash_ids": ids} for ids in ([1], [], [2**63], None)])
@example([{"input_toks": 2, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [10**30, 2]}])
def test_junk_under_known_keys_raises_only_value_errors(file, records):
    file.write_text("\n".join(map(json.dumps, records)))
    try:
        trace = read_requests(file)
    except ValueError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert len(trace) >= 1
