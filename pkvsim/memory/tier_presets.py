"""Whole machines of tiers, each rate with its source or named as an assumption."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pkvsim.memory.tiers import DISK, HOST, UNITS, Tier, check_tiers, parse_bytes, parse_tier

GIB = UNITS["GiB"]
PAPER = "arXiv 2606.14779v1 (10 June 2026)"

# Host memory is read through the GPU's PCIe 5.0 x16 link: 55.5 GB/s measured on an H200 host from pinned memory.
HOST_READ = 55.5e9
# A data-centre NVMe of PCIe 5.0 x4 reads 14 GB/s in sequence by its datasheets (Samsung PM1743, 14,000 MB/s read and
# 6,000 MB/s written: https://semiconductor.samsung.com/ssd/enterprise-ssd/pm1743/). Which ones the paper used is
# not known here.
NVME_READ, NVME_WRITE = 14e9, 6e9
# Of a read through the kernel's file system 84 % of the time is spent in it (the paper's abstract), so the device's own
# rate is reached 16 % of the time.
FILE_SYSTEM_SHARE = 0.84


def _host(name: str, capacity_gib: int) -> Tier:
    return Tier(
        name=name, kind=HOST, capacity_bytes=capacity_gib * GIB, read_bytes_per_s=HOST_READ,
        write_bytes_per_s=HOST_READ,
        source="a host memory module behind PCIe 5.0 x16, as measured on an H200 host; capacity assumed",
    )  # fmt: skip


def _disk(name: str, capacity_gib: int, share: float, source: str) -> Tier:
    return Tier(
        name=name, kind=DISK, capacity_bytes=capacity_gib * GIB, read_bytes_per_s=NVME_READ * share,
        write_bytes_per_s=NVME_WRITE * share, read_latency_s=100e-6, source=source,
    )  # fmt: skip


# The machine of the paper: an H100, two host memory modules, two PCIe 5.0 NVMe read from user space.
UNIFIED_POOL = (
    _host("host0", 128), _host("host1", 128),
    _disk("disk0", 1024, 1.0, "PCIe 5.0 NVMe by its datasheet, read past the file system"),
    _disk("disk1", 1024, 1.0, "PCIe 5.0 NVMe by its datasheet, read past the file system"),
)  # fmt: skip
# What it beat: host memory first, then one SSD through the kernel's file system.
SERIAL_FILES = (
    _host("host", 128),
    _disk("disk", 1024, 1.0 - FILE_SYSTEM_SHARE, f"the same NVMe through the file system: {PAPER}, 84 % of the time"),
)  # fmt: skip

TIER_PRESETS: Mapping[str, tuple[Tier, ...]] = {"unified_pool": UNIFIED_POOL, "serial_files": SERIAL_FILES}


def find_tiers(texts: Sequence[str], measured: Mapping[str, Tier]) -> tuple[Tier, ...]:
    """The tiers that these name, in order: NAME:CAPACITY:READ[:WRITE] (parse_tier), a preset with all its tiers, or a
    tier that was measured by its NAME, with NAME:CAPACITY another capacity. ValueError says what was expected."""
    found: list[Tier] = []
    for text in texts:
        name, _, capacity = text.partition(":")
        if text in TIER_PRESETS:
            found += TIER_PRESETS[text]
        elif name in measured and ":" not in capacity:
            tier = measured[name]
            found.append(replace(tier, capacity_bytes=parse_bytes(capacity)) if capacity else tier)
        elif ":" not in capacity:
            known = ", ".join((*TIER_PRESETS, *measured))
            raise ValueError(f"tier: expected NAME:CAPACITY:READ[:WRITE], or one of {known}, got {text!r}")
        else:
            found.append(parse_tier(text))
    check_tiers(found)
    return tuple(found)
