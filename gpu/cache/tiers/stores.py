"""What a cache is told of its tiers, and tiers as text: "host:64GiB:50", "disk0:1TiB:7=/mnt/nvme0/kv", or what a device
file has measured."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpu.cache.tiers.disks.disk_reads import Reader
from pkvsim.memory.tier_presets import find_tiers
from pkvsim.memory.tiers import DISK, HOST, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStore:
    """An arena of host memory. node: of NUMA, None for any; pin: registers it with CUDA."""

    tier: Tier
    node: int | None = None
    pin: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStore:
    """A directory on a disk. Raises ValueError naming the field.

    ring_bytes: pinned memory that its blocks pass through; bytes_under_way: most that the disk is asked for at once;
    reader: of open_reader(), or what makes one from (depth, buffers); stall_s: after which it is given up.
    """

    tier: Tier
    directory: str
    ring_bytes: int = 256 * 2**20
    bytes_under_way: int = 64 * 2**20
    reader: str | Callable[[int, Sequence[tuple[int, int]]], Reader] = "auto"
    stall_s: float = 30.0
    pin: bool = True

    def __post_init__(self) -> None:
        if not os.fspath(self.directory):
            raise ValueError("directory: expected a directory's name, got an empty one")
        for field in ("ring_bytes", "bytes_under_way"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"{field}: expected an integer >= 1, got {getattr(self, field)!r}")
        if not self.stall_s > 0:
            raise ValueError(f"stall_s: expected seconds > 0, got {self.stall_s!r}")


def check_stores(host: Sequence[HostStore], disks: Sequence[DiskStore], block_bytes: int) -> None:
    """ValueError unless host memory and disks are what they are given as, and each has room for a block."""
    for kind, tiers in ((HOST, [one.tier for one in host]), (DISK, [one.tier for one in disks])):
        for tier in tiers:
            if tier.kind != kind:
                raise ValueError(f"{kind}: expected a tier of that kind, got {tier.kind} {tier.name}")
            if not tier.slots(block_bytes):
                raise ValueError(f"{kind}: expected room for a block of {block_bytes:,} bytes, {tier.name} has "
                                 f"{tier.capacity_bytes:,}")


def parse_stores(
    texts: Sequence[str], measured: Mapping[str, Tier] | None = None, *, pin: bool = True
) -> tuple[list[HostStore], list[DiskStore]]:  # fmt: skip
    """(host memory, disks) of TIER for host memory and TIER=DIRECTORY for a disk, TIER as `pkvsim whatif --tier` has
    it: NAME:CAPACITY:READ[:WRITE], or the name of a measured one, with NAME:CAPACITY another capacity.

    measured: a device file's tiers (pkvsim.devices.device.get_device(...).tiers), by which blocks are placed and loads
    priced. Host memory named host0, host1 and so on lies on that NUMA node. Raises ValueError naming the argument.
    """
    parts = [text.partition("=") for text in texts]
    tiers = find_tiers([name for name, _, _ in parts], measured or {})
    if len(tiers) != len(parts):
        raise ValueError(f"tiers: expected one tier each, got {', '.join(texts)}")
    host, disks = [], []
    for tier, (_, _, directory), text in zip(tiers, parts, texts):
        if (tier.kind == HOST) == bool(directory):
            raise ValueError(f"tiers: expected host memory, or a disk with =DIRECTORY, got {text!r}")
        if tier.kind == HOST:
            node = tier.name.removeprefix(HOST)
            host.append(HostStore(tier=tier, node=int(node) if node.isdecimal() else None, pin=pin))
        else:
            # A shell expands a tilde at the beginning of a word, and here it stands behind the equals sign.
            disks.append(DiskStore(tier=tier, directory=os.path.expanduser(directory), pin=pin))
    return host, disks
