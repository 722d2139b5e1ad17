"""Tiers by name: whole machines of them, each rate with its source or named as an assumption, and measured ones."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pkvsim.memory.placement import BANDWIDTH, IN_ORDER
from pkvsim.memory.retention import LRU_NAME
from pkvsim.memory.tier_options import BY_PRICE, TierSetup
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



@dataclass(frozen=True, slots=True, kw_only=True)
class TierPreset:
    """A machine's tiers, and how it uses them where nobody says otherwise.

    host_link_gb_s: of the link to one GPU that all its loads share, assumed where the GPU's own was not measured.
    """

    tiers: tuple[Tier, ...]
    placement: str = BANDWIDTH
    serial: bool = False
    host_link_gb_s: float = HOST_READ / 1e9


TIER_PRESETS: Mapping[str, TierPreset] = {
    "unified_pool": TierPreset(tiers=UNIFIED_POOL),
    "serial_files": TierPreset(tiers=SERIAL_FILES, placement=IN_ORDER, serial=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTiers:
    """Tiers as find_tiers takes them and how they are used, before it is known which GPU they stand behind.

    placement, serial, host_link_gb_s: None, as a preset has it that is named alone, and else by bandwidth, all at once,
    and as the GPU's file says.
    """

    names: tuple[str, ...]
    placement: str | None = None
    retention: str = LRU_NAME
    admission: str = "all"
    load: str = BY_PRICE
    serial: bool | None = None
    host_link_gb_s: float | None = None
    hold_cost: float | None = None

    def setup(self, measured: Mapping[str, Tier], measured_link_gb_s: float | None) -> TierSetup:
        """The tiers behind a GPU whose file has these tiers and this link. ValueError says what was expected."""
        tiers = find_tiers(self.names, measured)
        alone = TIER_PRESETS.get(self.names[0]) if len(self.names) == 1 else None
        presets = [TIER_PRESETS[name] for name in self.names if name in TIER_PRESETS]
        link = self.host_link_gb_s
        if link is None and measured_link_gb_s is None and presets:
            link = presets[0].host_link_gb_s
        placement, serial = (alone.placement, alone.serial) if alone else (BANDWIDTH, False)
        return TierSetup(
            tiers=tiers, placement=placement if self.placement is None else self.placement, retention=self.retention,
            admission=self.admission, load=self.load, serial=serial if self.serial is None else self.serial,
            host_link_gb_s=link, hold_cost=self.hold_cost,
        )  # fmt: skip


def find_tiers(texts: Sequence[str], measured: Mapping[str, Tier]) -> tuple[Tier, ...]:
    """The tiers that these name, in order: NAME:CAPACITY:READ[:WRITE] (parse_tier), a preset with all its tiers, or a
    tier that was measured by its NAME, with NAME:CAPACITY another capacity. ValueError says what was expected."""
    found: list[Tier] = []
    for text in texts:
        name, _, capacity = text.partition(":")
        if text in TIER_PRESETS:
            found += TIER_PRESETS[text].tiers
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
