"""Serves a trace's prompt blocks from tiers: what is hit, how long its load takes, and which device it waits for.

The decisions are those of MemoryPool, the same that the GPU's tiered cache carries out. Each device reads one request
after another at its rate and all devices of a request read at once; or, as engines without a pool do, one after the
other (serial). A request's blocks are stored as soon as it is served, at no cost to reads.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from pkvsim.memory.device_clock import DeviceClock
from pkvsim.memory.load_or_recompute import choose_prefix, in_layers
from pkvsim.memory.restarts import Flushed, check_restarts, restart
from pkvsim.memory.retention import BELADY_NAME, GAPS_KEPT, choose_ttl_s
from pkvsim.memory.tier_options import TierOptions
from pkvsim.memory.tiers import Tier


class BlockRequests(NamedTuple):
    """n requests in order of arrival: request i has blocks hashes[offsets[i] : offsets[i + 1]], from its start."""

    arrival_s: np.ndarray  # [n] float64, not decreasing
    offsets: np.ndarray  # [n + 1] int64
    hashes: np.ndarray  # [offsets[n]] int64
    session: np.ndarray | None = None  # [n] int, requests of one conversation share it, -1 none


@dataclass(frozen=True, slots=True, eq=False)
class TierLoads:
    """What each of n requests got from t tiers.

    blocked_s: from arrival until the device had delivered this request's bytes, 0 where it asked for none; load_s:
    until all of them were there, behind the shared link.
    """

    blocks: np.ndarray  # [n] int64, of the prompt
    hits: np.ndarray  # [n] int64, leading blocks that were there
    loaded: np.ndarray  # [n] int64, at most hits: what was worth loading
    bytes_by_tier: np.ndarray  # [n, t] int64
    blocked_s: np.ndarray  # [n, t] float64
    load_s: np.ndarray  # [n] float64
    ttft_s: np.ndarray  # [n] float64, load and compute together; NaN without prices
    evicted: int
    refused: int
    restarts: tuple[Flushed, ...] = ()


def simulate_tiers(
    requests: BlockRequests,
    tiers: Sequence[Tier],
    *,
    block_bytes: int,
    options: TierOptions = TierOptions(),
    compute_s: Callable[[int, np.ndarray], np.ndarray] | None = None,
    restarts_s: Sequence[float] = (),
) -> TierLoads:
    """Serves requests in order. compute_s(request, blocks loaded [k]) -> [k] seconds to compute the rest of the prompt;
    without it everything that is there is loaded. restarts_s: when the server closes in good order and opens again: it
    loads nothing before disks have written what options.flush_s lets them, and host memory is empty then. Raises
    ValueError naming the argument."""
    offsets = np.asarray(requests.offsets, np.int64)
    n = len(requests.arrival_s)
    if len(offsets) != n + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(requests.hashes):
        raise ValueError(f"offsets: expected [{n + 1}] rising from 0 to {len(requests.hashes)}")
    if not (np.isfinite(requests.arrival_s).all() and (np.diff(requests.arrival_s) >= 0).all()):
        raise ValueError("arrival_s: expected seconds that do not decrease: a device reads one request after another")
    holding = options.hold_cost is not None
    if holding and (compute_s is None or requests.session is None):
        raise ValueError("hold_cost: expected prices (compute_s) and sessions with it")
    last_turn: dict[int, float] = {}  # of each session, when its last request came
    gaps: list[float] = []
    next_use: dict[Hashable, float] = {}
    follows = _next_uses(requests) if options.retention == BELADY_NAME else None
    pool = options.make_pool(tiers, block_bytes=block_bytes, next_use=next_use.__getitem__)
    due, restarts = check_restarts(restarts_s), list[Flushed]()
    devices = DeviceClock(tiers, link_bytes_per_s=options.link_bytes_per_s, serial=options.serial)
    out = TierLoads(
        np.diff(offsets), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, len(tiers)), np.int64),
        np.zeros((n, len(tiers))), np.zeros(n), np.full(n, np.nan), 0, 0,
    )  # fmt: skip
    for i in range(n):
        now = float(requests.arrival_s[i])
        while due and due[0] <= now:
            restarts.append(restart(pool, devices, now_s=due.pop(0), flush_s=options.flush_s))
        keys = requests.hashes[offsets[i] : offsets[i + 1]].tolist()
        if follows is not None:
            next_use.update(zip(keys, follows[offsets[i] : offsets[i + 1]].tolist()))
        pool.expire(now)
        hits = pool.ready_prefix(keys)
        wanted, computed = hits, np.nan
        if compute_s is not None:
            places = pool.places(keys[:hits])
            times = devices.load_times_s(places, block_bytes, now)
            layers = options.num_layers if in_layers(tiers, places) else 1
            choice = choose_prefix(times, partial(compute_s, i), num_layers=layers)
            wanted, computed = choice.blocks, choice.compute_s
        reads = pool.want(keys, limit=wanted)
        counts = np.bincount([read.place.tier for read in reads], minlength=len(tiers))
        out.hits[i], out.loaded[i] = hits, len(reads)
        out.bytes_by_tier[i] = counts * block_bytes
        loaded = devices.read(out.bytes_by_tier[i], now)
        out.blocked_s[i], out.load_s[i] = loaded.ends_s - now, loaded.end_s - now
        if compute_s is not None:
            load = out.load_s[i]
            layers = options.num_layers if in_layers(tiers, [read.place.tier for read in reads]) else 1
            out.ttft_s[i] = max(load + computed / layers, load / layers + computed)
        pool.done_all(reads)
        for write in pool.store(keys):
            pool.stored(write)
        pool.touch(keys)
        if holding and compute_s is not None and requests.session is not None and requests.session[i] >= 0:
            session = int(requests.session[i])
            if session in last_turn:
                gaps.append(now - last_turn[session])
            last_turn[session] = now
            none, all_ = compute_s(i, np.array([0, len(keys)]))
            ttl_s = choose_ttl_s(gaps[-GAPS_KEPT:], benefit_s=none - all_, cost_s_per_s=options.hold_cost or 0.0)
            if ttl_s:
                pool.hold(keys, now + ttl_s)
    return TierLoads(
        out.blocks, out.hits, out.loaded, out.bytes_by_tier, out.blocked_s, out.load_s, out.ttft_s,
        pool.counts.evicted, pool.counts.refused, tuple(restarts),
    )  # fmt: skip


def _next_uses(requests: BlockRequests) -> np.ndarray:
    """For every block of every request, the next request that has it, float64 [blocks], infinity where none."""
    following: dict[int, float] = {}
    out = np.full(len(requests.hashes), np.inf)
    hashes = requests.hashes.tolist()
    offsets = np.asarray(requests.offsets).tolist()
    for i in range(len(offsets) - 2, -1, -1):
        for at in range(offsets[i], offsets[i + 1]):
            out[at] = following.get(hashes[at], np.inf)
        for at in range(offsets[i], offsets[i + 1]):
            following[hashes[at]] = float(i)
    return out
