"""Request traces in seconds: what arrives when, how long it is, which prompt blocks it shares, and transforms."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int

TIED_SHARE = 0.1  # part of the requests that must share a timestamp before ticks count as coarse
FEWEST_TICKS = 16  # distinct timestamps below which equal ones may well be meant
GRID_TOLERANCE = 0.02  # how far, in ticks, a gap may be from a whole number of ticks
GRID_SHARE = 0.95  # part of the gaps that must be whole numbers of ticks
MAX_SEED = 2**64 - 1
MAX_RATE_SCALE = 1e9  # and the least is its reciprocal
MAX_JITTER_S = 1e9  # thirty years


@dataclass(frozen=True, slots=True, eq=False)
class RequestTrace:
    """n requests in order of arrival, each with at least one prompt and one output token.

    Request i's prompt blocks are block_hashes[block_offsets[i] : block_offsets[i + 1]], one per block_tokens
    tokens, the last one partly filled; equal hashes are equal blocks after equal prefixes. Traces without
    hashes have None for both arrays and 0 for block_tokens.

    When a request is sent: at arrival_s, and not before
    - think_us after the end of the request that it follows, after[i] (a turn of a conversation waits for the one
      before it; arrival_s is then the earliest that this can be), and
    - fewer than `concurrency` requests sent before it are unfinished (clients that wait for an answer; with all
      arrivals at 0 this is a closed loop).
    Raises ValueError naming the field.
    """

    name: str
    arrival_s: np.ndarray  # [n] float64, non-decreasing
    prompt_tokens: np.ndarray  # [n] int64
    output_tokens: np.ndarray  # [n] int64
    block_hashes: np.ndarray | None = None  # [blocks of all requests] int64
    block_offsets: np.ndarray | None = None  # [n + 1] int64
    block_tokens: int = 0
    session: np.ndarray | None = None  # [n] int32, requests of one conversation share it, -1 none
    after: np.ndarray | None = None  # [n] int32, an earlier request whose end this one waits for, -1 none
    think_us: np.ndarray | None = None  # [n] float64, from that end to sending; with after, or neither
    concurrency: int | None = None  # most requests in flight, None: no limit
    notes: tuple[str, ...] = ()  # what reading and transforms changed

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrival_s", _column("arrival_s", self.arrival_s, np.float64, None))
        n = len(self.arrival_s)
        if n == 0:
            raise ValueError("arrival_s: expected at least one request, got none")
        if not np.isfinite(self.arrival_s).all() or (np.diff(self.arrival_s) < 0).any():
            raise ValueError("arrival_s: expected finite, non-decreasing seconds")
        for name in ("prompt_tokens", "output_tokens"):
            column = _column(name, getattr(self, name), np.int64, n)
            low, high = int(column.min()), int(column.max())
            if low < 1 or high > MAX_TOKENS:
                raise ValueError(f"{name}: expected lengths in [1, {MAX_TOKENS}], got {low} to {high}")
            object.__setattr__(self, name, column)
        self._check_waits(n)
        if self.block_hashes is None and self.block_offsets is None:
            return
        if self.block_hashes is None or self.block_offsets is None:
            raise ValueError("block_hashes, block_offsets: expected both or neither")
        check_int("block_tokens", self.block_tokens, 1, MAX_TOKENS)
        object.__setattr__(self, "block_hashes", _column("block_hashes", self.block_hashes, np.int64, None))
        object.__setattr__(self, "block_offsets", _column("block_offsets", self.block_offsets, np.int64, n + 1))
        blocks = -(-self.prompt_tokens // self.block_tokens)
        if self.block_offsets[0] != 0 or (np.diff(self.block_offsets) != blocks).any():
            raise ValueError(f"block_offsets: expected one hash per {self.block_tokens} prompt tokens of each request")
        if len(self.block_hashes) != self.block_offsets[-1]:
            raise ValueError(f"block_hashes: expected {self.block_offsets[-1]} hashes, got {len(self.block_hashes)}")

    def _check_waits(self, n: int) -> None:
        if self.concurrency is not None:
            check_int("concurrency", self.concurrency, 1, MAX_TOKENS)
        if self.session is not None:
            object.__setattr__(self, "session", _column("session", self.session, np.int32, n))
        if self.after is None and self.think_us is None:
            return
        if self.after is None or self.think_us is None:
            raise ValueError("after, think_us: expected both or neither")
        after = _column("after", self.after, np.int32, n)
        think_us = _column("think_us", self.think_us, np.float64, n)
        object.__setattr__(self, "after", after)
        object.__setattr__(self, "think_us", think_us)
        if (after < -1).any() or (after >= np.arange(n)).any():
            raise ValueError("after: expected -1 or the index of an earlier request")
        if not (np.isfinite(think_us) & (think_us >= 0)).all():
            raise ValueError("think_us: expected finite numbers >= 0")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate_per_s(self) -> float | None:
        """Requests per second of duration_s; None where all arrive at once."""
        return len(self) / self.duration_s if self.duration_s > 0 else None


def _column(name: str, values: Any, dtype: type, length: int | None) -> np.ndarray:
    array = np.asarray(values)
    kinds = "iuf" if dtype is np.float64 else "iu"
    if array.ndim != 1 or (array.dtype.kind not in kinds and array.size) or length not in (None, len(array)):
        want = "n" if length is None else length
        raise ValueError(f"{name}: expected {np.dtype(dtype)} [{want}], got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, dtype)


def scale_rate(trace: RequestTrace, rate_scale: float) -> RequestTrace:
    """The same requests arriving rate_scale times as fast (2 halves every gap)."""
    if not 1 / MAX_RATE_SCALE <= rate_scale <= MAX_RATE_SCALE:
        span = f"[{1 / MAX_RATE_SCALE:g}, {MAX_RATE_SCALE:g}]"
        raise ValueError(f"rate_scale: expected a number in {span}, got {rate_scale!r}")
    if rate_scale == 1:
        return trace
    start = trace.arrival_s[0]
    scaled = replace(trace, arrival_s=start + (trace.arrival_s - start) / rate_scale)
    return with_note(scaled, f"arrival rate scaled by {rate_scale:g}")


def at_rate(trace: RequestTrace, rate_per_s: float) -> RequestTrace:
    """The same requests at rate_per_s requests per second on average."""
    if trace.rate_per_s is None:
        raise ValueError(f"rate: {trace.name} has all requests at one time, which no rate can be made of")
    if not 0 < rate_per_s < np.inf:
        raise ValueError(f"rate: expected requests per second > 0, got {rate_per_s!r}")
    return scale_rate(trace, rate_per_s / trace.rate_per_s)


def closed_loop(trace: RequestTrace, concurrency: int, *, keep_arrivals: bool = False) -> RequestTrace:
    """At most `concurrency` requests in flight; unless keep_arrivals they are all there from the start."""
    arrival_s = trace.arrival_s if keep_arrivals else np.zeros(len(trace))
    note = f"at most {concurrency} requests in flight" + ("" if keep_arrivals else ", whenever the trace has them")
    return with_note(replace(trace, arrival_s=arrival_s, concurrency=concurrency), note)


def jitter(trace: RequestTrace, jitter_s: float, *, seed: int = 0) -> RequestTrace:
    """Every arrival moved by a uniform draw from [-jitter_s, jitter_s], not before the first, and sorted again.

    Requests that follow others move with the first of them.
    """
    if not 0 <= jitter_s <= MAX_JITTER_S:
        raise ValueError(f"jitter_s: expected seconds in [0, {MAX_JITTER_S:g}], got {jitter_s!r}")
    if jitter_s == 0:
        return trace
    moves = _generator(seed).uniform(-jitter_s, jitter_s, len(trace))[_starts(trace)]
    arrivals = np.maximum(trace.arrival_s + moves, trace.arrival_s[0])
    order = np.argsort(arrivals, kind="stable")
    return with_note(
        reorder(trace, order, arrivals[order]), f"arrivals moved by up to {jitter_s:g} s, seed {seed}"
    )


def first_requests(trace: RequestTrace, limit: int) -> RequestTrace:
    """The first `limit` requests."""
    check_int("limit", limit, 1, MAX_TOKENS)
    if limit >= len(trace):
        return trace
    first = reorder(trace, np.arange(limit), trace.arrival_s[:limit])
    return with_note(first, f"first {limit:,} of {len(trace):,} requests")


def tick_s(trace: RequestTrace) -> float | None:
    """The clock tick of timestamps that tick coarsely; None where they do not.

    Coarse means that there are 16 distinct timestamps or more, that at least a tenth of the requests share theirs
    with another, and that timestamps lie whole numbers of ticks apart. Mooncake's tick every 3 s, within 3 ms.
    """
    times, counts = np.unique(trace.arrival_s, return_counts=True)
    if len(times) < FEWEST_TICKS or counts[counts > 1].sum() < TIED_SHARE * len(trace):
        return None
    gaps = np.diff(times)
    tick = float(np.quantile(gaps, 0.05))
    ticks = gaps / tick
    whole = (np.abs(ticks - np.rint(ticks)) <= GRID_TOLERANCE) & (ticks > 0.5)
    return float(np.median(gaps[ticks < 1.5])) if whole.mean() >= GRID_SHARE else None


def spread_ticks(trace: RequestTrace, *, seed: int = 0) -> RequestTrace:
    """Spreads the arrivals of each coarse tick uniformly over it, in the file's order.

    Left as they are, thousands of requests would arrive in bursts that only the trace's clock made. Where
    timestamps do not tick coarsely the trace itself comes back.
    """
    tick = tick_s(trace)
    if tick is None:
        return trace
    times, index = np.unique(trace.arrival_s, return_inverse=True)
    room = np.minimum(np.append(np.diff(times), tick), tick)  # [distinct timestamps], never into the next tick
    arrivals = np.sort(trace.arrival_s + _generator(seed).random(len(trace)) * room[index])
    note = f"timestamps tick every {tick:g} s: arrivals spread over each tick, seed {seed}"
    return with_note(replace(trace, arrival_s=arrivals), note)


def reorder(trace: RequestTrace, order: np.ndarray, arrival_s: np.ndarray) -> RequestTrace:
    """The requests `order` [m] of a trace, arriving at arrival_s [m]."""
    hashes = offsets = None
    if trace.block_hashes is not None and trace.block_offsets is not None:
        hashes, offsets = gather_blocks(trace.block_hashes, trace.block_offsets, order)
    return replace(
        trace,
        arrival_s=arrival_s,
        prompt_tokens=trace.prompt_tokens[order],
        output_tokens=trace.output_tokens[order],
        block_hashes=hashes,
        block_offsets=offsets,
        session=None if trace.session is None else trace.session[order],
        after=None if trace.after is None else renumber(trace.after, order),
        think_us=None if trace.think_us is None else trace.think_us[order],
    )


def renumber(after: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`after` [n] of the requests `order` [m], by their places in order: int32 [m], -1 where that one is left out."""
    places = np.full(len(after) + 1, -1, np.int32)  # the last entry is where -1 leads
    places[order] = np.arange(len(order), dtype=np.int32)
    return places[after[order]]


def _starts(trace: RequestTrace) -> np.ndarray:
    """The request that each one's chain of earlier ones begins with, int64 [n]; itself where it follows none."""
    starts = np.arange(len(trace))
    if trace.after is not None:
        for index in np.flatnonzero(trace.after >= 0):
            starts[index] = starts[trace.after[index]]
    return starts


def gather_blocks(hashes: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The block hashes of the requests `order` [m], end to end, and their offsets [m + 1]."""
    counts = np.diff(offsets)[order]
    ends = np.append(0, np.cumsum(counts))
    source = np.repeat(offsets[order] - ends[:-1], counts) + np.arange(ends[-1])
    return hashes[source], ends


def with_note(trace: RequestTrace, note: str) -> RequestTrace:
    """The trace with one more note."""
    return replace(trace, notes=trace.notes + (note,))


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(check_int("seed", seed, 0, MAX_SEED)))
