"""Opens a directory as a disk of a pool: its files, the ring that its blocks pass through, and what reads them."""
from __future__ import annotations

from collections.abc import Callable

from gpu.cache.tiers.disks.disk_files import DiskFiles
from gpu.cache.tiers.disks.disk_jobs import Porter
from gpu.cache.tiers.disks.disk_tier import DiskTier
from gpu.cache.tiers.disks.open_reader import open_reader
from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.stores import DiskStore


def open_disk(
    store: DiskStore, porter: Porter, *, block_bytes: int, contents: str, observe: Callable[[int, float], None],
    stalled: Callable[[], None],
) -> DiskTier:  # fmt: skip
    """A disk at work, for blocks of block_bytes. contents: as DiskFiles has it; porter, observe, stalled: as DiskTier
    has them. Raises ValueError naming the argument, and has nothing open then."""
    files = DiskFiles(
        store.directory, block_bytes=block_bytes, slots=store.tier.slots(block_bytes), contents=contents
    )
    try:
        buffers = max(2, store.ring_bytes // files.slot_bytes)
        ring = HostArena(slots=buffers, slot_bytes=files.slot_bytes, pin=store.pin)
        depth = max(1, min(store.bytes_under_way // files.slot_bytes, buffers))
        try:
            if callable(store.reader):
                reader = store.reader(depth, [ring.region])
            else:
                reader = open_reader(depth=depth, buffers=[ring.region], kind=store.reader)
        except BaseException as error:
            ring.close()
            if isinstance(error, OSError):
                raise ValueError(f"reader: {store.reader} cannot be had: {error}") from error
            raise
    except BaseException:
        files.close()
        raise
    return DiskTier(
        files, reader, ring, porter, bytes_under_way=store.bytes_under_way, stall_s=store.stall_s, observe=observe,
        stalled=stalled,
    )  # fmt: skip
