"""A trace as a picture: requests over time, and how prompt and output lengths are distributed."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from pkvsim.reports.plots import picture
from pkvsim.traces.requests import RequestTrace

TIME_BINS = 120


def plot_trace(trace: RequestTrace, path: str | Path) -> None:
    """Draws to a .png or .svg file. Raises ValueError for another suffix, a place that cannot be written to,
    or without matplotlib."""
    with picture(path, width=10, height=3.6) as figure:
        rate, lengths = figure.subplots(1, 2)
        counts, edges = np.histogram(trace.arrival_s, TIME_BINS)
        width_s = edges[1] - edges[0]
        rate.stairs(counts / width_s, edges, fill=True)
        rate.set(xlabel="time, s", ylabel="requests/s", title=f"{trace.name}: {len(trace):,} requests")
        share = np.arange(1, len(trace) + 1) / len(trace)
        for name, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
            lengths.plot(np.sort(tokens), share, label=name, drawstyle="steps-post")
        lengths.set(xscale="log", xlabel="tokens", ylabel="share of requests", title="lengths", ylim=(0, 1.02))
        lengths.legend()
