"""When each device of a pool and the link to the GPU have done what was asked of them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pkvsim.memory.load_or_recompute import load_times_s
from pkvsim.memory.tiers import Tier


class Loaded(NamedTuple):
    """When a request's bytes come: begins and ends [t] of each device's part, equal where it has none, and the end
    behind the link, all in the clock's seconds."""

    begins_s: np.ndarray
    ends_s: np.ndarray
    end_s: float


class DeviceClock:
    """Devices that read one request after another at their rates, and write beside that, one block after another.

    Reads and writes of a device do not slow each other, which is an assumption: full-duplex links, and writes that
    wait for idle disks.
    """

    __slots__ = ("_read_rates", "_write_rates", "_latency", "_read_free_s", "_write_free_s", "_link_free_s", "_link",
                 "_serial")  # fmt: skip

    def __init__(self, tiers: Sequence[Tier], *, link_bytes_per_s: float = float("inf"), serial: bool = False) -> None:
        """link_bytes_per_s: what all reads share on their way to the GPU. serial: a request reads one device after
        another instead of all at once."""
        self._read_rates = np.array([tier.read_bytes_per_s for tier in tiers])
        self._write_rates = [tier.write_bytes_per_s for tier in tiers]
        self._latency = np.array([tier.read_latency_s for tier in tiers])
        self._read_free_s = np.zeros(len(tiers))
        self._write_free_s = [0.0] * len(tiers)
        self._link_free_s = 0.0
        self._link, self._serial = link_bytes_per_s, serial

    def load_times_s(self, places: Sequence[int], block_bytes: int, now_s: float) -> np.ndarray:
        """Seconds from now until the first k of the blocks at these places are read, float64 [blocks + 1]."""
        backlog = np.maximum(self._read_free_s - now_s, 0.0) + self._latency
        if not self._serial:
            return load_times_s(
                places, block_bytes, self._read_rates, backlog_s=backlog, link_bytes_per_s=self._link
            )  # fmt: skip
        each = block_bytes / self._read_rates
        done = np.zeros(len(places) + 1)
        for tier in range(len(each)):
            count = np.concatenate(([0], np.cumsum(np.asarray(places, np.int64) == tier)))
            done += np.where(count > 0, count * each[tier] + backlog[tier], 0.0)
        return np.maximum(done, np.arange(len(places) + 1) * block_bytes / self._link)

    def read(self, num_bytes: np.ndarray, now_s: float) -> Loaded:
        """Reads num_bytes [t] int64 from now on."""
        begins, ends = np.full(len(num_bytes), now_s), np.full(len(num_bytes), now_s)
        at = now_s
        for tier in np.flatnonzero(num_bytes):
            begins[tier] = max(at if self._serial else now_s, self._read_free_s[tier])
            ends[tier] = at = begins[tier] + self._latency[tier] + num_bytes[tier] / self._read_rates[tier]
            self._read_free_s[tier] = at
        if not num_bytes.any():
            return Loaded(begins, ends, now_s)
        link_s = float(num_bytes.sum() / self._link)
        begin = max(now_s, self._link_free_s)
        self._link_free_s = begin + link_s
        return Loaded(begins, ends, max(float(ends.max()), begin + link_s))

    def write_end_s(self, tier: int, num_bytes: int, now_s: float) -> float:
        """When a write to a device that is asked for now would end."""
        return max(now_s, self._write_free_s[tier]) + num_bytes / self._write_rates[tier]

    def wait_until(self, time_s: float) -> None:
        """No device reads before that time."""
        self._read_free_s = np.maximum(self._read_free_s, time_s)

    def write(self, tier: int, num_bytes: int, now_s: float) -> tuple[float, float]:
        """(begin, end) of a write to a device."""
        begin = max(now_s, self._write_free_s[tier])
        self._write_free_s[tier] = end = self.write_end_s(tier, num_bytes, now_s)
        return begin, end
