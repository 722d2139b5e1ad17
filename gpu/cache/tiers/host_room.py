"""How much host memory is there to be had: more than that is not refused by the kernel, which ends processes for it."""
from __future__ import annotations

import os
from pathlib import Path

PROC, SYS = Path("/proc"), Path("/sys")


def free_host_bytes(node: int | None = None, *, proc: Path = PROC, sys: Path = SYS) -> int:
    """Memory that is free or can be made so, of a NUMA node or of the machine, within the limits of this process's
    control groups. proc, sys: where the kernel tells of them."""
    limits = [_machine_bytes(node, proc, sys), *_group_bytes(proc, sys)]
    return max(0, min(limits))


def _machine_bytes(node: int | None, proc: Path, sys: Path) -> int:
    if node is not None:
        place = sys / f"devices/system/node/node{node}/meminfo"
        if place.exists():
            fields = {line.split()[2].rstrip(":"): int(line.split()[3]) for line in place.read_text().splitlines()}
            return 2**10 * (fields["MemFree"] + fields.get("FilePages", 0))
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 2**10 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bytes(proc: Path, sys: Path) -> list[int]:
    """What each control group of this process, version 2, has left; files that it keeps in memory are given up for
    others. A container sees its own group as the root of all."""
    root, found = sys / "fs/cgroup", []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[4:] for line in lines if line.startswith("0::/")), "")
    inner = root / own
    for group in dict.fromkeys((inner, *inner.parents, root)):
        try:
            limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            found.append(int(limit) - int(used) + files)
    return found
