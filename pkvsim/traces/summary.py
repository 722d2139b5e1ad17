"""What is in a request trace: rates, length percentiles, histograms, prefix reuse."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.traces.requests import RequestTrace, tick_s

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Token counts of n requests. bin_counts[i] of them lie in [bin_edges[i], bin_edges[i + 1])."""

    total: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: int
    bin_edges: tuple[int, ...]  # powers of two
    bin_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Rates are requests per second. Nones: all arrive at once, no coarse ticks, no block hashes."""

    name: str
    requests: int
    duration_s: float
    rate_per_s: float | None
    interarrival_cv: float | None  # standard deviation over mean of the gaps between arrivals
    tick_s: float | None
    prompt: LengthSummary
    output: LengthSummary
    block_tokens: int
    prompt_blocks: int
    prefix_reuse: float | None  # part of the prompt blocks that an infinite cache hits
    sessions: int | None  # conversations of several turns; None where the trace does not say
    follow_ups: int  # requests that wait for an earlier one's end
    concurrency: int | None  # most requests in flight; None: no limit
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summary(trace: RequestTrace) -> TraceSummary:
    """The figures of a trace. Percentiles interpolate linearly."""
    gaps = np.diff(trace.arrival_s)
    mean_gap = float(gaps.mean()) if len(gaps) else 0.0
    return TraceSummary(
        name=trace.name,
        requests=len(trace),
        duration_s=trace.duration_s,
        rate_per_s=trace.rate_per_s,
        interarrival_cv=float(gaps.std()) / mean_gap if mean_gap > 0 else None,
        tick_s=tick_s(trace),
        prompt=_lengths(trace.prompt_tokens),
        output=_lengths(trace.output_tokens),
        block_tokens=trace.block_tokens,
        prompt_blocks=0 if trace.block_hashes is None else len(trace.block_hashes),
        prefix_reuse=prefix_reuse(trace),
        sessions=None if trace.session is None else len(np.unique(trace.session[trace.session >= 0])),
        follow_ups=0 if trace.after is None else int((trace.after >= 0).sum()),
        concurrency=trace.concurrency,
        notes=trace.notes,
    )


def prefix_reuse(trace: RequestTrace) -> float | None:
    """The part of the prompt blocks that an infinite cache holds when they arrive; None without hashes.

    A block is a hit where its hash and those of all blocks before it in the prompt came with earlier requests: a
    cache that lacks a block cannot use what follows it, as in pkvsim.memory.prefix_cache.
    """
    if trace.block_hashes is None or trace.block_offsets is None:
        return None
    total = len(trace.block_hashes)
    begins, lengths = trace.block_offsets[:-1], np.diff(trace.block_offsets)
    request = np.repeat(np.arange(len(trace)), lengths)
    _, first, ids = np.unique(trace.block_hashes, return_index=True, return_inverse=True)
    is_new = request[first][ids.reshape(-1)] == request
    misses = np.where(is_new, np.arange(total), total)
    hits = np.minimum(np.minimum.reduceat(misses, begins) - begins, lengths)
    return float(hits.sum()) / total


def _lengths(tokens: np.ndarray) -> LengthSummary:
    p50, p90, p99 = (float(x) for x in np.percentile(tokens, PERCENTILES))
    low = int(tokens.min()).bit_length() - 1
    edges = 2 ** np.arange(low, int(tokens.max()).bit_length() + 1)
    counts = np.histogram(tokens, edges)[0]
    return LengthSummary(
        total=int(tokens.sum()),
        mean=float(tokens.mean()),
        p50=p50,
        p90=p90,
        p99=p99,
        max=int(tokens.max()),
        bin_edges=tuple(edges.tolist()),
        bin_counts=tuple(counts.tolist()),
    )
