"""Which device each block of a group goes to, so that all devices finish reading it together.

Blocks go to device i with share b_i / sum(b), b the read rates (Unified KV Pooling, arXiv 2606.14779): whole blocks by
the largest remainder, the earlier device where remainders tie. Equal shares over unlike devices read at N times the
slowest, these at the sum of all. Where a device has no room for its share, it takes what it can and the others divide
the rest by their own shares.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BANDWIDTH, EQUAL, CAPACITY, IN_ORDER = "bandwidth", "equal", "capacity", "in_order"
PLACEMENTS = (BANDWIDTH, EQUAL, CAPACITY, IN_ORDER)


def share_counts(
    num_blocks: int, weights: Sequence[float] | np.ndarray, room: Sequence[int] | np.ndarray
) -> np.ndarray:  # fmt: skip
    """Blocks for each device, int64 [devices]: num_blocks by weights [devices], at most room [devices] each.

    They add up to num_blocks or, where that does not fit, to the room there is; a device of weight 0 gets none. Where
    no room binds, each is within one block of num_blocks * weight / sum(weights).
    """
    weights = np.asarray(weights, np.float64)
    room = np.where(weights > 0, np.asarray(room, np.int64), 0)
    counts = np.zeros(len(weights), np.int64)
    open_ = room > 0
    left = min(int(num_blocks), int(room.sum()))
    while left:
        # A device whose share passes its room is filled, and the rest divided again among the others.
        quota = np.where(open_, left * (weights / weights[open_].sum()), 0.0)
        full = open_ & (np.floor(quota) >= room)
        if not full.any():
            whole = np.floor(quota).astype(np.int64)
            whole[np.flatnonzero(open_)[0]] += min(0, left - int(whole.sum()))  # floor() of rounded-up products
            spare = left - int(whole.sum())
            by_remainder = np.argsort(np.where(open_, whole - quota, np.inf), kind="stable")
            whole[by_remainder[:spare]] += 1
            return counts + whole
        counts[full] = room[full]
        left -= int(room[full].sum())
        open_ &= ~full
    return counts


def in_order_counts(num_blocks: int, room: Sequence[int] | np.ndarray) -> np.ndarray:
    """Blocks for each device, int64 [devices]: the first is filled before the second gets any."""
    before = np.concatenate(([0], np.cumsum(np.asarray(room, np.int64))))
    return np.diff(np.minimum(before, num_blocks))


def spread(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """The device of each block, int32 [sum(counts)], with each device's blocks spread evenly over the group.

    Whoever reads a leading part of the group alone then still reads all devices in about their shares: block j of a
    device with c of them stands at (j + 1/2) / c of the way, devices in order where that ties.
    """
    counts = np.asarray(counts, np.int64)
    devices = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    within = np.arange(len(devices)) - np.repeat(np.cumsum(counts) - counts, counts)
    return devices[np.argsort((within + 0.5) / np.maximum(np.repeat(counts, counts), 1), kind="stable")]


def place(
    num_blocks: int,
    weights: Sequence[float] | np.ndarray,
    room: Sequence[int] | np.ndarray,
    *,
    already: Sequence[int] | np.ndarray | None = None,
    placement: str = BANDWIDTH,
) -> np.ndarray:
    """The device of each block of a group, int32 [num_blocks], or fewer where there is no room for all.

    already [devices]: blocks of the same prefix that the devices hold; the shares are of the whole prefix then, so that
    a conversation which grows by a block at a time stays spread. placement: by bandwidth, in equal parts, by capacity
    (weights are capacities then, so that no device gives up a prefix's blocks sooner than another), or in order, which
    fills one device before the next and leaves blocks in one run (what engines without a pool do).
    """
    room = np.where(np.asarray(weights) > 0, np.asarray(room, np.int64), 0)
    if placement == IN_ORDER:
        return np.repeat(np.arange(len(room), dtype=np.int32), in_order_counts(num_blocks, room))
    if placement == EQUAL:
        weights = (np.asarray(weights, np.float64) > 0).astype(np.float64)
    if already is None or not np.any(already):
        return spread(share_counts(num_blocks, weights, room))
    already = np.asarray(already, np.int64)
    total = num_blocks + int(already.sum())
    # A device that holds more than its share of the whole gets nothing; the others divide by what each is short of.
    shares = np.asarray(weights, np.float64)
    short = np.maximum(share_counts(total, weights, already + room) - already, 0)
    if int(short.sum()) > num_blocks:
        short = share_counts(num_blocks, np.where(shares > 0, short, 0), short)
    return spread(short)


class Shares:
    """The weights that placement uses, and when they follow what was measured.

    observe() keeps a moving average of each device's rate; once one is off its weight by more than `drift`, all weights
    become the averages, so that placement changes rarely and everything placed between two changes shares one plan.
    """

    __slots__ = ("weights", "replans", "_measured", "_drift", "_smoothing", "_lost")

    def __init__(self, bytes_per_s: Sequence[float], *, drift: float = 0.2, smoothing: float = 0.1) -> None:
        """bytes_per_s [devices]: read rates to begin with."""
        if not 0 < smoothing <= 1 or not drift > 0:
            raise ValueError(f"drift, smoothing: expected > 0 and (0, 1], got {drift}, {smoothing}")
        self.weights = np.array(bytes_per_s, np.float64)  # [devices]
        self.replans = 0
        self._measured = self.weights.copy()
        self._drift = drift
        self._smoothing = smoothing
        self._lost = np.zeros(len(self.weights), bool)

    def observe(self, device: int, num_bytes: int, seconds: float) -> bool:
        """Adds a measured read of a busy device; True where it changed the plan."""
        if seconds <= 0 or num_bytes <= 0 or self._lost[device]:
            return False
        self._measured[device] += self._smoothing * (num_bytes / seconds - self._measured[device])
        if abs(self._measured[device] - self.weights[device]) <= self._drift * self.weights[device]:
            return False
        self.weights = np.where(self._lost, 0.0, self._measured)
        self.replans += 1
        return True

    def lose(self, device: int) -> None:
        """Gives a device that failed no more blocks."""
        self._lost[device] = True
        self.weights = np.where(self._lost, 0.0, self.weights)
        self.replans += 1
