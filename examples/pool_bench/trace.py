"""Where the time of disks goes that are read at once: rates while they had something to read, and what held them up."""
from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables import Table
from pool_bench.disks import keys_of, limited_disk, store_all, timed_load

from gpu.cache.tiers.device import Device, NoPages
from gpu.cache.tiers.disks.disk_jobs import Phase
from gpu.cache.tiers.disks.disk_reads import LimitedReader
from gpu.cache.tiers.tiered_cache import TieredKVCache

NOT_READING = Phase.IDLE.value, Phase.DRAIN.value
CLOCKS = "wall_s", "cpu_s"
WORKING = tuple(phase.value for phase in (Phase.ASK, Phase.CHECK, Phase.HAND_OVER, Phase.END))
NOTE = (
    "What is not processor time of ask, check, hand over and end went to locks (Python's is "
    "one) and to other processes. Means of blocks: behind is how much later than the limiter's time one had been read, "
    "told late how much later than that the thread asked for it."
)


@dataclass(frozen=True, slots=True)
class DiskTrace:
    """What one disk did between two moments. Seconds; wall_s and cpu_s by phase; limit_gb_s, idle_s, behind_s and
    untold_s: of its limiter, None without one."""

    name: str
    gb: float
    blocks: int
    wall_s: dict[str, float]
    cpu_s: dict[str, float]
    copies: int
    copies_s: float
    porter_s: float
    limit_gb_s: float | None = None
    idle_s: float | None = None
    behind_s: float | None = None
    untold_s: float | None = None

    @property
    def reading_s(self) -> float:
        """In which something was left to read or to hand over."""
        return sum(seconds for phase, seconds in self.wall_s.items() if phase not in NOT_READING)

    @property
    def gb_s(self) -> float:
        return self.gb / self.reading_s if self.reading_s else 0.0

    def cells(self) -> dict[str, str]:
        """What it tells, by what a row is called."""
        whole = self.reading_s or 1.0
        worked = sum(self.wall_s[name] for name in WORKING) or 1.0
        shares = {
            "waiting for blocks": self.wall_s["read"], "waiting for buffers": self.wall_s["slots"],
            **{name: self.wall_s[name] for name in WORKING},
        }  # fmt: skip
        out = {"GB": f"{self.gb:.2f}", "GB/s while blocks were left": f"{self.gb_s:.2f}"}
        out |= {f"{name}, % of that time": f"{seconds / whole * 100:.1f}" for name, seconds in shares.items()}
        out[f"processor, % of {', '.join(WORKING)}"] = f"{sum(self.cpu_s[name] for name in WORKING) / worked * 100:.0f}"
        out["thread, cores per GB/s"] = f"{sum(self.cpu_s.values()) / max(self.gb, 1e-9):.3f}"
        out["check, cores per GB/s"] = f"{self.cpu_s[Phase.CHECK.value] / max(self.gb, 1e-9):.3f}"
        each = 1e3 / max(self.copies, 1)
        out["hand-overs"] = f"{self.copies}"
        out["ms until one is asked for; copied"] = f"{self.porter_s * each:.1f}; {self.copies_s * each:.1f}"
        if self.limit_gb_s is not None:
            each = 1e3 / max(self.blocks, 1)
            out["limiter, GB/s"] = f"{self.limit_gb_s:g}"
            out["limiter had nothing to do, %"] = f"{self.idle_s / whole * 100:.1f}"
            out["behind; told late, ms"] = f"{self.behind_s * each:.2f}; {self.untold_s * each:.2f}"
        return out


class Tracer:
    """Traces of a cache's disks from start() to stop(). limiters: of the disks by name, where they have one."""

    def __init__(self, cache: TieredKVCache, limiters: dict[str, LimitedReader]) -> None:
        self._cache, self._limiters = cache, limiters
        self._before: dict[str, Any] = {}

    def start(self) -> None:
        """Counts from here on. No read may be under way."""
        self._before = self._cache.stats()
        for limiter in self._limiters.values():
            limiter.count_from_here()

    def stop(self) -> list[DiskTrace]:
        """What the disks have done since start()."""
        found = []
        for name, after in self._cache.stats().items():
            if not isinstance(after, dict):
                continue
            before, limiter = self._before[name], self._limiters.get(name)
            limits = {} if limiter is None else {
                "limit_gb_s": limiter.bytes_per_s / 1e9, "idle_s": limiter.idle_s, "behind_s": limiter.behind_s,
                "untold_s": limiter.untold_s,
            }  # fmt: skip
            found.append(DiskTrace(
                name, (after["read_bytes"] - before["read_bytes"]) / 1e9, after["read"] - before["read"],
                *({phase: after[key][phase] - before[key][phase] for phase in after[key]} for key in CLOCKS),
                copies=after["copies"] - before["copies"], copies_s=after["copies_s"] - before["copies_s"],
                porter_s=after["porter_s"] - before["porter_s"], **limits,
            ))  # fmt: skip
        return found


def table_of(title: str, traces: Sequence[DiskTrace], more: str = "") -> Table:
    """A column for each disk. more: said below it."""
    cells = [trace.cells() for trace in traces]
    rows = tuple((name, *(one[name] for one in cells)) for name in cells[0])
    return Table(title, ("", *(trace.name for trace in traces)), rows, f"{NOTE} {more}".rstrip())


def limited_disks(
    directory: Path, rates: Sequence[float], device: Device, *, blocks: int, repeats: int = 3
) -> tuple[float, list[DiskTrace]]:  # fmt: skip
    """Disks limited to rates [n], bytes/s, read at once with nothing beside them: (GB/s in all of the fastest of
    `repeats` loads, its traces)."""
    pin, limiters = not isinstance(device, NoPages), {}
    place = Path(tempfile.mkdtemp(dir=directory, prefix="pool-"))
    try:
        stores = [
            limited_disk(f"disk{at}", place, rate, int(blocks * rate / sum(rates) * 1.01) + 8, device.block_bytes,
                         pin=pin, limiters=limiters)
            for at, rate in enumerate(rates)
        ]  # fmt: skip
        with TieredKVCache(device, disks=stores, drift=1e9) as cache:
            keys, tracer = keys_of("limited", blocks), Tracer(cache, limiters)
            store_all(cache, keys, group=blocks)
            loads = []
            for _ in range(repeats):
                tracer.start()
                seconds, _ = timed_load(cache, keys)
                loads.append((blocks * device.block_bytes / seconds / 1e9, tracer.stop()))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return max(loads, key=lambda load: load[0])
