"""Chooses what carries out a disk's reads and writes on this machine."""
from __future__ import annotations

from collections.abc import Sequence

from gpu.cache.tiers.disks.disk_reads import THREADS, Reader, ThreadReader
from gpu.cache.tiers.disks.io_uring import IoUringReader


def open_reader(*, depth: int, buffers: Sequence[tuple[int, int]] = (), kind: str = "auto") -> Reader:
    """The fastest reader this kernel allows: io_uring, or a pool of threads where it is switched off.

    depth: most requests under way; buffers: (address, bytes) that all requests use, registered where that is allowed;
    kind: io_uring or preadv to have just that one. Raises ValueError naming the argument, and OSError where io_uring
    was asked for and is not allowed.
    """
    if kind not in ("auto", "io_uring", "preadv"):
        raise ValueError(f"kind: expected auto, io_uring or preadv, got {kind!r}")
    if kind == "preadv":
        return ThreadReader(threads=min(depth, THREADS))
    try:
        return IoUringReader(depth=depth, buffers=buffers)
    except OSError:
        if kind == "io_uring":
            raise
        return ThreadReader(threads=min(depth, THREADS))
