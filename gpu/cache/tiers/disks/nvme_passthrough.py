"""NVMe commands to /dev/ng* through io_uring: reads and writes past the file system and the block layer.

UNTESTED ON HARDWARE: the commands are checked against a stand-in alone (tests/cache/tiers/test_nvme_passthrough.py).
The slots lie on the namespace itself from first_byte on, which must hold nothing else; a request's descriptor is not
used. Numbers and offsets are those of linux/nvme_ioctl.h and of the NVMe command set.
"""
from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gpu.cache.tiers.disks.disk_reads import Done, Request
from gpu.cache.tiers.disks.io_uring import SETUP_CQE32, SETUP_SQE128, URING_CMD, Ring

_NVME_IOCTL_ID = 0x4E40
NVME_URING_CMD_IO = 0xC0484E80  # _IOWR('N', 0x80, struct nvme_uring_cmd)
WRITE_COMMAND, READ_COMMAND = 1, 2
COMMAND = np.dtype([
    ("opcode", "u1"), ("flags", "u1"), ("reserved", "<u2"), ("nsid", "<u4"), ("cdw2", "<u4"), ("cdw3", "<u4"),
    ("metadata", "<u8"), ("address", "<u8"), ("metadata_length", "<u4"), ("data_length", "<u4"), ("cdw10", "<u4"),
    ("cdw11", "<u4"), ("cdw12", "<u4"), ("cdw13", "<u4"), ("cdw14", "<u4"), ("cdw15", "<u4"), ("timeout_ms", "<u4"),
    ("reserved2", "<u4"),
])  # fmt: skip
SQE128 = np.dtype([
    ("opcode", "u1"), ("flags", "u1"), ("ioprio", "<u2"), ("fd", "<i4"), ("command_op", "<u4"), ("pad", "<u4"),
    ("address", "<u8"), ("length", "<u4"), ("command_flags", "<u4"), ("user_data", "<u8"), ("rest", "V8"),
    ("command", COMMAND), ("rest2", "V8"),
])  # fmt: skip


class CommandRing(Protocol):
    """The part of io_uring's Ring that is used here."""

    entries: int
    sqes: np.ndarray

    def places(self, count: int) -> np.ndarray: ...
    def push(self, count: int) -> None: ...
    def wait(self, seconds: float, few: int = 1) -> None: ...
    def pop(self) -> np.ndarray: ...
    def close(self) -> None: ...


class NvmePassthroughReader:
    """Reads and writes of one namespace, as gpu.cache.tiers.disks.disk_reads.Reader has it."""

    __slots__ = ("name", "_ring", "_fd", "_nsid", "_block", "_first", "_most", "_left", "_waiting", "_under_way")

    def __init__(
        self, *, fd: int, nsid: int, ring: CommandRing, logical_block_bytes: int = 512, first_byte: int = 0,
        max_command_bytes: int = 128 * 2**10,
    ) -> None:  # fmt: skip
        """fd: of /dev/ng*; max_command_bytes: the controller's largest transfer, into which requests are cut."""
        if max_command_bytes % logical_block_bytes or first_byte % logical_block_bytes:
            raise ValueError(f"max_command_bytes, first_byte: expected multiples of {logical_block_bytes}, got "
                             f"{max_command_bytes}, {first_byte}")
        self.name = "nvme passthrough (untested on hardware)"
        self._ring, self._fd, self._nsid = ring, fd, nsid
        self._block, self._first, self._most = logical_block_bytes, first_byte, max_command_bytes
        self._left: dict[int, list[int]] = {}  # tag -> commands left, bytes, error
        self._waiting: list[tuple[Request, int, int]] = []  # pieces for which the ring has had no room: offset, bytes
        self._under_way = 0

    @classmethod
    def open(cls, path: str, *, depth: int, logical_block_bytes: int = 512, first_byte: int = 0,
             max_command_bytes: int = 128 * 2**10) -> NvmePassthroughReader:  # fmt: skip
        """Opens a device such as /dev/ng0n1. OSError where the kernel allows neither it nor the ring."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            nsid = fcntl.ioctl(fd, _NVME_IOCTL_ID)
            ring = Ring(depth, flags=SETUP_SQE128 | SETUP_CQE32)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd=fd, nsid=nsid, ring=ring, logical_block_bytes=logical_block_bytes, first_byte=first_byte,
                   max_command_bytes=max_command_bytes)  # fmt: skip

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            starts = range(0, request.num_bytes, self._most)
            self._left[request.tag] = [len(starts), request.num_bytes, 0]
            self._waiting += [(request, at, min(self._most, request.num_bytes - at)) for at in starts]
        self._push()

    def _push(self) -> None:
        pieces = self._waiting[: self._ring.entries - self._under_way]
        if not pieces:
            return
        self._waiting = self._waiting[len(pieces) :]
        entries = np.zeros(len(pieces), SQE128)
        entries["opcode"], entries["fd"], entries["command_op"] = URING_CMD, self._fd, NVME_URING_CMD_IO
        for entry, (request, at, num_bytes) in zip(entries, pieces):
            entry["user_data"] = request.tag
            first = (self._first + request.offset + at) // self._block
            command = entry["command"]
            command["opcode"] = WRITE_COMMAND if request.write else READ_COMMAND
            command["nsid"], command["address"], command["data_length"] = self._nsid, request.address + at, num_bytes
            command["cdw10"], command["cdw11"] = first & 0xFFFFFFFF, first >> 32
            command["cdw12"] = num_bytes // self._block - 1
        self._ring.sqes[self._ring.places(len(pieces))] = entries.view(np.uint8).reshape(len(pieces), 128)
        self._ring.push(len(pieces))
        self._under_way += len(pieces)

    def poll(self, wait_s: float, few: int = 1) -> list[Done]:
        if not self._left:
            return []
        self._ring.wait(wait_s, min(few, self._under_way))
        out = []
        for tag, result in zip(*(self._popped())):
            left = self._left[tag]
            left[0] -= 1
            if result:  # an error of the kernel, or an NVMe status
                left[2] = result if result < 0 else -errno.EIO
            if not left[0]:
                del self._left[tag]
                out.append(Done(tag, left[2] or left[1]))
        self._push()
        return out

    def _popped(self) -> tuple[list[int], list[int]]:
        ended = self._ring.pop()
        self._under_way -= len(ended)
        return ended["user_data"].tolist(), ended["result"].tolist()

    def close(self) -> None:
        self._ring.close()
        os.close(self._fd)
