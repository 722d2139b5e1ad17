"""Writers of every request file format, for the tests of their readers."""
import csv
import io
import json
from datetime import datetime, timedelta

from hypothesis import strategies as st

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
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
