"""What a disk of a tiered cache has done so far, as its stats() tell."""
from __future__ import annotations

from typing import Any

from gpu.cache.tiers.disks.disk_jobs import by_name
from gpu.cache.tiers.disks.disk_tier import DiskTier


def disk_stats(disk: DiskTier, weight: float) -> dict[str, Any]:
    """weight: by which blocks are placed, bytes/s; 0 of a disk that is not used any more."""
    counts = disk.counts
    return {
        "reader": disk.reader_name, "direct": disk.files.direct, "read": counts.read,
        "written": counts.written, "faults": counts.faults, "busy_s": counts.busy_s,
        "read_bytes": counts.read * disk.files.block_bytes, "thread_s": counts.thread_s, "stalled": disk.is_stalled,
        "last_fault": counts.last_fault, "queued": disk.queued, "weight_bytes_per_s": weight, "copies": counts.copies,
        "copies_s": counts.copies_s, "porter_s": counts.porter_s, "wall_s": by_name(counts.spent.wall_s),
        "cpu_s": by_name(counts.spent.cpu_s),
    }  # fmt: skip
