"""Traces and configurations that the serving tests share."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.models.presets import get_model, kv_bytes_per_token
from pkvsim.outside.derive import outside_entry
from pkvsim.serving.server_config import ServingConfig
from pkvsim.traces.requests import RequestTrace

DEVICE = get_device("h200")
MODEL = get_model("llama-3.1-8b")
GPT_OSS = get_model("gpt-oss-20b")  # half of its layers slide
BLOCK_TOKENS = 32


def steady(device: DeviceSpec) -> DeviceSpec:
    """The GPU with clocks that neither its idling nor its heat changes, and a host that keeps up: equal steps take equal
    times."""
    entry = outside_entry(device, "vllm")
    constants = replace(entry.constants, boost=1.0, boost_ms=0.0, wake_factor=1.0, eager_layer_us=0.0)
    return replace(device, outside={"vllm": replace(entry, constants=constants)})


def kv_gib(pages: int, page_size: int = 16, model=MODEL) -> float:
    """GiB that hold exactly so many pages."""
    return pages * page_size * kv_bytes_per_token(model) / 2**30


def make_trace(rows, *, gap_s: float = 0.0, blocks: bool = False) -> RequestTrace:
    """rows: (seconds after the previous arrival, prompt tokens, output tokens[, prefix tree choices])."""
    arrival = np.cumsum([row[0] for row in rows]) + gap_s
    prompt = np.array([row[1] for row in rows], np.int64)
    output = np.array([row[2] for row in rows], np.int64)
    if not blocks:
        return RequestTrace("case", arrival, prompt, output)
    names: dict[tuple, int] = {}
    hashes, offsets = [], [0]
    for row in rows:
        path: tuple = ()
        for depth in range(-(-row[1] // BLOCK_TOKENS)):
            left = min(BLOCK_TOKENS, row[1] - depth * BLOCK_TOKENS)
            path += ((row[3][depth % len(row[3])], left),)
            hashes.append(names.setdefault(path, len(names)))
        offsets.append(len(hashes))
    return RequestTrace("case", arrival, prompt, output, np.array(hashes), np.array(offsets), BLOCK_TOKENS)


@st.composite
def waits(draw, trace):
    """The trace with requests that follow others, and at most so many in flight; either may be missing."""
    n = len(trace)
    concurrency = draw(st.none() | st.integers(1, 6))
    if draw(st.booleans()):
        return replace(trace, concurrency=concurrency)
    after = [draw(st.integers(-1, at - 1)) for at in range(n)]
    think_us = draw(st.lists(st.sampled_from([0.0, 1.0, 5e3, 2e5]), min_size=n, max_size=n))
    return replace(trace, after=np.array(after), think_us=np.array(think_us), concurrency=concurrency)


def poisson_trace(n: int, rate: float, prompt: int, output: int, seed: int) -> RequestTrace:
    """Independent exponential gaps, constant lengths."""
    arrival = np.cumsum(np.random.Generator(np.random.PCG64(seed)).exponential(1 / rate, n))
    return RequestTrace("poisson", arrival, np.full(n, prompt), np.full(n, output))


@st.composite
def crowded(draw, *, blocks: bool = False, serial: bool = False):
    """(trace, config): a few requests on a pool that is often too small for them."""
    longest = draw(st.integers(1, 300))
    request = (st.floats(0, 0.05), st.integers(1, longest), st.integers(1, 60))
    if blocks:
        request += (st.lists(st.integers(0, 2), min_size=1, max_size=4),)
    rows = draw(st.lists(st.tuples(*request), min_size=1, max_size=30))
    page_size = draw(st.sampled_from([1, 16, 32]))
    kv_pages = draw(st.integers(1, 800 // page_size + 1))
    max_batch = 1 if serial else draw(st.integers(1, 12))
    config = ServingConfig(
        page_size=page_size,
        kv_gib=kv_gib(kv_pages, page_size),
        max_batch=max_batch,
        step_tokens=draw(st.integers(max_batch, 200)),
        keep_free_fraction=draw(st.sampled_from([0.0, 0.05])),
    )
    pool = kv_pages * page_size
    assume(any(row[1] + row[2] + page_size <= pool for row in rows))  # a trace of which nothing fits is refused
    return make_trace(rows, blocks=blocks), config
