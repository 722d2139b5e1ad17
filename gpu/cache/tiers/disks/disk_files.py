"""A directory on a disk as numbered slots of one block each, that a restart reads without trusting any of it.

    lock       held by the one process that uses the directory
    pool.json  what the slots hold; another model's or layout's blocks are refused
    blocks     slot s at s * slot_bytes: a header of 4 KiB, then the block, padded to 4 KiB; preallocated
    complete   64 bytes a slot: the key of the block that is complete there, or zeros
    used       8 bytes a slot, while nobody uses the directory: of two blocks, the one used later has the larger number

A slot's record in `complete` is cleared before the slot is written, and written after. So whenever a process dies, what
the records list had been written whole. A header repeats key and slot and has the block's sums, which every read
compares with those of what it has brought: torn writes, flipped bits, blocks of elsewhere and records that outlived a
power cut are misses, never KV.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from gpu.cache.tiers.host_arena import ALIGNMENT, round_up, view

HEADER_BYTES = ALIGNMENT
MAX_KEY_BYTES = 32
MAX_SLOT_BYTES = 2**31 - ALIGNMENT  # what Linux reads or writes in one call at most
FORMAT = 2

_HEADER = struct.Struct("<8sQQ2QI4x32sI4x")  # magic, slot, block bytes, its two sums, key bytes, key; CRC of these
_RECORD = struct.Struct("<4sI32sI20x")  # magic, key bytes, key, CRC of these
_HEADER_MAGIC, _RECORD_MAGIC = b"PKVBLK02", b"DONE"
RECORD_BYTES = _RECORD.size


def check_key(key: object) -> bytes:
    """ValueError unless the key is 1 to 32 bytes."""
    if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"key: expected 1 to {MAX_KEY_BYTES} bytes, got {key!r}")
    return key


def seal(address: int, block_bytes: int, key: bytes, slot: int, sums: np.ndarray) -> None:
    """Writes the header of the block that lies behind it in a buffer of HEADER_BYTES + block_bytes. sums: the block's,
    [SUMS] uint64."""
    head = _HEADER.pack(_HEADER_MAGIC, slot, block_bytes, *sums.tolist(), len(key), key, 0)
    target = view(address, HEADER_BYTES)
    target[: len(head)] = head[:-8] + struct.pack("<I4x", zlib.crc32(head[:-8]))
    target[len(head) :] = bytes(HEADER_BYTES - len(head))


def read_header(buffer: memoryview, block_bytes: int, key: bytes, slot: int) -> tuple[str | None, tuple[int, int]]:
    """(What is wrong with the header in a buffer that was read from a slot, None where it is that of the key's block,
    the sums that the block behind it must have)."""
    magic, at, length, *sums, key_bytes, stored, crc = _HEADER.unpack_from(buffer)
    fault = None
    if magic != _HEADER_MAGIC or crc != zlib.crc32(buffer[: _HEADER.size - 8]):
        fault = "no valid header"
    elif at != slot or length != block_bytes or stored[:key_bytes] != key:
        fault = "another block's header"
    return fault, (sums[0], sums[1])


class DiskFiles:
    """The files of one directory, open and locked.

    fd: of the blocks, for reads and writes of slot_bytes at offset(slot). direct: whether they pass the page cache by;
    False on file systems without O_DIRECT.
    """

    __slots__ = ("directory", "block_bytes", "slots", "slot_bytes", "fd", "direct", "_lock", "_complete")

    def __init__(self, directory: str | os.PathLike, *, block_bytes: int, slots: int, contents: str = "") -> None:
        """block_bytes: of a block; slots: how many; contents: what a block is (model, layout, type), which must be what
        the directory's blocks are. Raises ValueError naming the argument, among others where another process has it."""
        if block_bytes < 1 or slots < 1:
            raise ValueError(f"block_bytes, slots: expected >= 1, got {block_bytes}, {slots}")
        self.directory = Path(directory)
        self.block_bytes, self.slots = block_bytes, slots
        self.slot_bytes = HEADER_BYTES + round_up(block_bytes)
        if self.slot_bytes > MAX_SLOT_BYTES:
            raise ValueError(f"block_bytes: expected at most {MAX_SLOT_BYTES - HEADER_BYTES:,}, which is read in one "
                             f"call, got {block_bytes:,}")
        self.fd = self._lock = self._complete = -1
        self.direct = True
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"directory: expected one that nobody uses, {directory} is locked") from None
            self._check_contents(contents)
            self._open_blocks()
            self._complete = os.open(self.directory / "complete", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            whole = os.fstat(self.fd).st_size // self.slot_bytes * RECORD_BYTES
            if os.fstat(self._complete).st_size > whole:  # blocks that somebody cut off, which are no faults of a disk
                os.ftruncate(self._complete, whole)
            self._allocate()
        except OSError as error:
            self.close()
            raise ValueError(f"directory: {directory} cannot hold the blocks: {error}") from error
        except ValueError:
            self.close()
            raise

    def _check_contents(self, contents: str) -> None:
        place = self.directory / "pool.json"
        wanted = {"format": FORMAT, "block_bytes": self.block_bytes, "contents": contents}
        try:
            found = json.loads(place.read_text())
        except FileNotFoundError:
            scratch = place.with_suffix(".new")
            scratch.write_text(json.dumps(wanted))
            scratch.replace(place)
            return
        except ValueError:
            raise ValueError(f"directory: {place} is no description of a pool") from None
        if found != wanted:
            raise ValueError(f"directory: expected blocks of {wanted}, {self.directory} has those of {found}")

    def _open_blocks(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self.fd = os.open(self.directory / "blocks", flags | os.O_DIRECT, 0o644)
        except OSError:
            self.fd, self.direct = os.open(self.directory / "blocks", flags, 0o644), False

    def _allocate(self) -> None:
        """Makes the file as long as all slots, with room on the disk for them where the file system can promise it."""
        length, wanted = os.fstat(self.fd).st_size, self.slots * self.slot_bytes
        if length >= wanted:
            return
        room = os.fstatvfs(self.fd)
        free = room.f_bavail * room.f_frsize
        if wanted - length > free:  # else allocation first fills the disk, then says so
            what = f"{os.strerror(errno.ENOSPC)}: expected {wanted - length:,} bytes, got {free:,}"
            raise OSError(errno.ENOSPC, what)
        try:
            os.posix_fallocate(self.fd, length, wanted - length)
        except OSError as error:
            # Network file systems and others promise no room: a write that finds none is a fault, which costs a block.
            promises_none = error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
            os.ftruncate(self.fd, wanted if promises_none else length)  # and gives back what it took before it failed
            if not promises_none:
                raise

    def offset(self, slot: int) -> int:
        """Of a slot in fd, bytes."""
        return slot * self.slot_bytes

    def complete(self) -> list[tuple[bytes, int]]:
        """(key, slot) of the blocks that had been written whole."""
        records = os.pread(self._complete, self.slots * RECORD_BYTES, 0)
        found = []
        for slot in range(len(records) // RECORD_BYTES):
            record = records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
            magic, length, key, crc = _RECORD.unpack(record)
            if magic == _RECORD_MAGIC and crc == zlib.crc32(record[:40]) and 1 <= length <= MAX_KEY_BYTES:
                found.append((key[:length], slot))
        return found

    def take_uses(self) -> np.ndarray:
        """[slots] uint64: what note_uses() noted last, zeros where it did not. Whoever takes them begins to use the
        blocks, and they hold no longer."""
        uses = np.zeros(self.slots, np.uint64)
        with contextlib.suppress(OSError):  # a hint, without which blocks go in another order
            noted = np.frombuffer((self.directory / "used").read_bytes()[: 8 * self.slots], np.uint8)
            noted = noted[: len(noted) // 8 * 8].view("<u8")
            uses[: len(noted)] = noted
            (self.directory / "used").unlink()
        return uses

    def note_uses(self, uses: np.ndarray) -> None:
        """When each slot's block was last used, [slots] uint64."""
        scratch = self.directory / "used.new"
        with contextlib.suppress(OSError):  # of a full disk, or one that is gone
            scratch.write_bytes(uses.astype("<u8").tobytes())
            scratch.replace(self.directory / "used")

    def begin(self, slot: int) -> None:
        """The slot is about to be written, or has no valid block. OSError where that cannot be noted."""
        os.pwrite(self._complete, bytes(RECORD_BYTES), slot * RECORD_BYTES)

    def finish(self, slot: int, key: bytes) -> None:
        """The slot has been written whole. OSError where that cannot be noted."""
        record = _RECORD.pack(_RECORD_MAGIC, len(key), key, 0)
        record = record[:40] + struct.pack("<I", zlib.crc32(record[:40])) + record[44:]
        os.pwrite(self._complete, record, slot * RECORD_BYTES)

    def close(self, *, keep_blocks: bool = False) -> None:
        """Closes the files and lets another process have the directory. keep_blocks: `fd` stays open, as a request that
        uses it may still begin, and must not meet another file of the same number."""
        if self._lock >= 0:  # which a forked process may have open as well
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        for fd in (-1 if keep_blocks else self.fd, self._complete, self._lock):
            if fd >= 0:
                with contextlib.suppress(OSError):  # already closed under us by a fault: nothing is left to keep
                    os.close(fd)
        self.fd = self._complete = self._lock = -1
