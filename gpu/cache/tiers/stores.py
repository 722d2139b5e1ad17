"""The tiers of a cache as text: "host:64GiB:50", "disk0:1TiB:7=/mnt/nvme0/kv", or what a device file has measured."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu.cache.tiers.tiered_cache import DiskStore, HostStore
from pkvsim.memory.tier_presets import find_tiers
from pkvsim.memory.tiers import HOST, Tier


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
            host.append(HostStore(tier=tier, node=int(node) if node.isdigit() else None, pin=pin))
        else:
            disks.append(DiskStore(tier=tier, directory=directory, pin=pin))
    return host, disks
