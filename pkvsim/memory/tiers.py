"""The places where KV blocks live outside a GPU's own pages: how much each holds and how fast it is.

A tier is one device that can be read on its own: an arena of host memory on one NUMA node, one disk. Rates are bytes
per second, GB/s = 1e9 bytes per second; capacities are bytes.
"""
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

HOST, DISK = "host", "disk"
KINDS = (HOST, DISK)
UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
MAX_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One device of the pool. Raises ValueError naming the field.

    read_latency_s: from asking for a block of an idle device to its first byte. assumed: where no measurement of this
    device stands behind its rates. source: who says so.
    """

    name: str
    kind: str
    capacity_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float
    read_latency_s: float = 0.0
    assumed: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name: expected a name of the tier, got an empty one")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.capacity_bytes, int) or not 0 <= self.capacity_bytes <= MAX_BYTES:
            raise ValueError(f"capacity_bytes: expected an integer in [0, 2^60], got {self.capacity_bytes!r}")
        for field in ("read_bytes_per_s", "write_bytes_per_s"):
            rate = getattr(self, field)
            if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0):
                raise ValueError(f"{field}: expected a finite rate > 0, got {rate!r}")
        if not (math.isfinite(self.read_latency_s) and self.read_latency_s >= 0):
            raise ValueError(f"read_latency_s: expected finite seconds >= 0, got {self.read_latency_s!r}")

    @property
    def is_lasting(self) -> bool:
        """Whether what it holds is there after a restart."""
        return self.kind == DISK

    def slots(self, block_bytes: int) -> int:
        """Blocks of block_bytes that it holds."""
        return self.capacity_bytes // block_bytes


def read_tier(name: str, entry: Any) -> Tier:
    """The tier of that name in a JSON file, an object of Tier's fields. ValueError says what was expected."""
    known = {field.name: field.type for field in fields(Tier)}
    if not isinstance(entry, dict) or not set(entry) <= set(known):
        raise ValueError(f"expected an object of {', '.join(known)}, got {entry!r}")
    for field, value in entry.items():
        kinds = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[str(known[field])]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{field}: expected {known[field]}, got {value!r}")
    try:
        tier = Tier(**entry)
    except TypeError as error:
        raise ValueError(str(error).replace("Tier.__init__() ", "")) from None
    if tier.name != name:
        raise ValueError(f"name: expected {name}, got {tier.name!r}")
    return tier


def check_tiers(tiers: Sequence[Tier]) -> None:
    """ValueError unless there is a tier and no name comes twice."""
    if not tiers:
        raise ValueError("tiers: expected at least one")
    names = [tier.name for tier in tiers]
    if len(set(names)) < len(names):
        raise ValueError(f"tiers: expected distinct names, got {', '.join(names)}")


def parse_bytes(text: str) -> int:
    """Bytes of "256GiB", "2TB" or "4096". ValueError where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)\s*", text)
    if match is None:
        raise ValueError(f"capacity: expected a number with one of {', '.join(UNITS)}, got {text!r}")
    return int(float(match[1]) * UNITS[match[2] or "B"])


def parse_tier(text: str) -> Tier:
    """A tier of NAME:CAPACITY:READ[:WRITE], rates in GB/s: "host:256GiB:50", "disk0:2TiB:7:5".

    Its kind is host where the name begins so, disk elsewhere; without WRITE it writes as fast as it reads. What a user
    gives counts as assumed. ValueError says what was expected.
    """
    parts = text.split(":")
    if len(parts) not in (3, 4):
        raise ValueError(f"tier: expected NAME:CAPACITY:READ[:WRITE], as host:256GiB:50, got {text!r}")
    rates = []
    for name, part in zip(("READ", "WRITE"), parts[2:]):
        try:
            rates.append(float(part) * 1e9)
        except ValueError:
            raise ValueError(f"tier: expected {name} in GB/s, got {part!r} in {text!r}") from None
    return Tier(
        name=parts[0],
        kind=HOST if parts[0].startswith(HOST) else DISK,
        capacity_bytes=parse_bytes(parts[1]),
        read_bytes_per_s=rates[0],
        write_bytes_per_s=rates[-1],
        source="given by the user",
    )
