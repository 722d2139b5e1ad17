"""The request traces that others publish, known by the columns or keys of their first record.

    format           columns or keys (more are ignored)                               arrivals
    Azure            TIMESTAMP, ContextTokens, GeneratedTokens                         dates and times
    BurstGPT         Timestamp, Request tokens, Response tokens                        seconds
    vidur            arrived_at, num_prefill_tokens, num_decode_tokens                 seconds
    Splitwise        arrival_timestamp, prompt_size, token_size                        seconds
    Mooncake         timestamp, input_length, output_length, hash_ids, delay,          by value: Mooncake and AIPerf
    (Bailian, AIPerf)  session_id                                                      write ms, Bailian seconds
    AIPerf with text timestamp, text_input or messages, output_length                  the same
    LLMServingSim    arrival_time_ns, input_toks, output_toks, input_tok_ids;          nanoseconds
                       sessions as arrival_time_ns, sub_requests
    AIPerf's records metadata.request_start_ns, metrics.input_sequence_length,         nanoseconds
                       metrics.output_sequence_length
    vLLM's results   start_times, input_lens, output_lens (`bench serve --save-detailed`)  seconds
    ShareGPT         conversations: the first message and its reply                    none
    the paper's      prompt_len or prompt, decode_len or decode, arrival or arrival_step  steps

Each may be CSV, JSON lines or a JSON array. Sources: https://github.com/Azure/AzurePublicDataset,
https://github.com/HPMLL/BurstGPT, https://github.com/microsoft/vidur (data/processed_traces),
https://github.com/mutinifni/splitwise-sim, https://github.com/kvcache-ai/Mooncake,
https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon, https://github.com/ai-dynamo/aiperf (docs),
https://github.com/casys-kaist/LLMServingSim (docs/docs/workloads/jsonl-format.md), https://github.com/vllm-project/vllm.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pkvsim.traces.rows import names
from pkvsim.traces.time_units import STEPS

DATES = "dates"  # arrivals as dates and times
BY_VALUE = "by value"  # arrivals in the unit that time_units.decide_unit finds
TOKEN_BLOCK = 16  # tokens in a block of a prompt that comes as token ids: vLLM's default block size


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """Column names, each in the spellings that are known; unit: DATES, BY_VALUE or one of time_units.TIME_UNITS."""

    label: str
    arrival: tuple[str, ...]
    prompt: tuple[str, ...]
    output: tuple[str, ...]
    unit: str
    optional_arrival: bool = False  # without it all requests arrive at 0
    prompt_is_text: bool = False
    output_is_text: bool = False

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        return self.arrival, self.prompt, self.output


FORMATS = (
    TraceFormat("Azure LLM inference", ("TIMESTAMP",), ("ContextTokens",), ("GeneratedTokens",), DATES),
    TraceFormat("BurstGPT", ("Timestamp",), ("Request tokens",), ("Response tokens",), "s"),
    TraceFormat("vidur", ("arrived_at",), ("num_prefill_tokens",), ("num_decode_tokens",), "s", optional_arrival=True),
    TraceFormat("Splitwise", ("arrival_timestamp",), ("prompt_size",), ("token_size",), "s", optional_arrival=True),
    TraceFormat("Mooncake", ("timestamp",), ("input_length",), ("output_length",), BY_VALUE, optional_arrival=True),
    TraceFormat(
        "AIPerf", ("timestamp",), ("text_input", "messages"), ("output_length",), BY_VALUE,
        optional_arrival=True, prompt_is_text=True,
    ),
    TraceFormat("LLMServingSim", ("arrival_time_ns",), ("input_toks",), ("output_toks",), "ns", optional_arrival=True),
    TraceFormat(
        "paper's", ("arrival", "arrival_step"), ("prompt_len", "prompt"), ("decode_len", "decode"), STEPS,
        optional_arrival=True,
    ),
)  # fmt: skip
SHAREGPT = TraceFormat(
    "ShareGPT", ("timestamp",), ("first message",), ("reply",), "s",
    optional_arrival=True, prompt_is_text=True, output_is_text=True,
)  # fmt: skip
RESULTS = TraceFormat(
    "benchmark result", ("start_times",), ("input_lens",), ("output_lens",), "s", optional_arrival=True
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """A format and how this file spells it; arrival None: the file has no such column."""

    form: TraceFormat
    arrival: str | None
    prompt: str
    output: str


def choose_format(where: str, found: Iterable[str]) -> ChosenFormat:
    """The format with most of the names found; ValueError, which begins with `where`, for what it lacks."""
    present = set(found)
    known = FORMATS + (SHAREGPT, RESULTS)
    best = max(known, key=lambda form: sum(not present.isdisjoint(spellings) for spellings in form.columns))
    spelled = []
    for spellings in best.columns:
        here = [name for name in spellings if name in present]
        if len(here) > 1:
            raise ValueError(f"{where}: column {' or '.join(spellings)}: expected one of them, found {names(here)}")
        spelled.append(here[0] if here else None)
    arrival, prompt, output = spelled
    if prompt is None and output is None and (arrival is None or not best.optional_arrival):
        if arrival is None:
            listed = "; ".join(f"{f.label}: {', '.join(s[0] for s in f.columns)}" for f in FORMATS)
            raise ValueError(f"{where}: columns of no known trace (known are {listed}), found {names(sorted(present))}")
    missing = [
        " or ".join(spellings)
        for spellings, name in zip(best.columns, spelled)
        if name is None and not (spellings is best.arrival and best.optional_arrival)
    ]
    if missing or prompt is None or output is None:
        lacks = f"column {', '.join(missing)}: missing for the {best.label} format"
        raise ValueError(f"{where}: {lacks}, found {names(sorted(present))}")
    return ChosenFormat(best, arrival, prompt, output)


def flat_records(file: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same records, one a request: those that hold several, or keep their figures deeper, are laid flat."""
    for line, record in rows:
        if "sub_requests" in record:
            yield from _session(f"{file}:{line}", line, record)
        elif "conversations" in record:
            yield line, _first_exchange(f"{file}:{line}", record["conversations"])
        elif "input_lens" in record and "output_lens" in record:
            yield from _result(f"{file}:{line}", line, record)
        elif "metrics" in record and "metadata" in record:
            yield line, _measured(f"{file}:{line}", record)
        else:
            if "input_tok_ids" in record and "hash_ids" not in record:
                record["hash_ids"] = _token_hashes(record)
            yield line, record


def _session(where: str, line: int, record: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """LLMServingSim's sessions: a call begins tool_duration_ns after the one before it has ended."""
    calls = record["sub_requests"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where}: column sub_requests: expected a list of objects, got {ascii(calls):.200}")
    session = record.get("session_id", f"line {line}")
    delay: Any = None
    for at, call in enumerate(calls):
        flat = {name: call.get(name) for name in ("input_toks", "output_toks")} | {"session_id": session}
        flat |= {"arrival_time_ns": record.get("arrival_time_ns")} if at == 0 else {"delay": delay}
        if "input_tok_ids" in call:
            flat["hash_ids"] = _token_hashes(call)
        delay = call.get("tool_duration_ns", 0)
        yield line, flat


def _first_exchange(where: str, messages: Any) -> dict[str, Any]:
    """ShareGPT's conversations, as the benchmarks of vLLM and SGLang take them: the first message and its reply."""
    turns = messages[:2] if isinstance(messages, list) else [None]
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        expected = "expected a list of from and value"
        raise ValueError(f"{where}: column conversations: {expected}, got {ascii(messages):.200}")
    first, reply = (texts + ["", ""])[:2]  # a conversation without a reply is a failed request
    return {"first message": first, "reply": reply}


def _result(where: str, line: int, record: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`vllm bench serve --save-detailed`: a list of each figure."""
    columns = {name: record[name] for name in ("input_lens", "output_lens", "start_times") if name in record}
    if not all(isinstance(column, list) and len(column) == len(record["input_lens"]) for column in columns.values()):
        raise ValueError(f"{where}: column input_lens, output_lens, start_times: expected lists of equal length")
    for row in zip(*columns.values()):
        yield line, dict(zip(columns, row))


def _measured(where: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record of AIPerf's profile_export.jsonl."""
    metadata, metrics = record["metadata"], record["metrics"]
    if not isinstance(metadata, dict) or not isinstance(metrics, dict):
        raise ValueError(f"{where}: column metadata, metrics: expected objects")
    lengths = [metrics.get(name, 0) for name in ("input_sequence_length", "output_sequence_length")]
    prompt, output = (entry.get("value") if isinstance(entry, dict) else entry for entry in lengths)
    return {"arrival_time_ns": metadata.get("request_start_ns"), "input_toks": prompt, "output_toks": output}


def _token_hashes(record: dict[str, Any]) -> list[int] | None:
    """A hash for every TOKEN_BLOCK token ids and all before them; None where the ids are not the whole prompt."""
    ids = record["input_tok_ids"]
    if not isinstance(ids, list) or len(ids) != record.get("input_toks") or not set(map(type, ids)) <= {int}:
        return None
    hashes, chained = [], 0
    for begin in range(0, len(ids), TOKEN_BLOCK):
        chained = hash((chained, *ids[begin : begin + TOKEN_BLOCK]))  # of integers: the same in every process
        hashes.append(chained)
    return hashes
