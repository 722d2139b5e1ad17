"""io_uring by its system calls, without liburing: a ring of requests and one of completions, shared with the kernel.

Field offsets and numbers are those of linux/io_uring.h. The kernel neither polls for requests nor does this process for
completions: a wait sleeps in io_uring_enter with a timeout. Every request is written before the tail that publishes it,
and the system call that follows orders both for the kernel.
"""
from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Sequence

import numpy as np

from gpu.cache.tiers.disks.disk_reads import Done, Request

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # system calls, the same on every architecture
_GETEVENTS, _EXT_ARG = 1, 8  # IORING_ENTER_*
_FEATURE_SINGLE_MMAP, _FEATURE_EXT_ARG = 1, 1 << 8
_OFF_SQES, _OFF_CQ = 0x10000000, 0x8000000
_REGISTER_BUFFERS = 0
READ_FIXED, WRITE_FIXED, READ, WRITE, URING_CMD = 4, 5, 22, 23, 46  # IORING_OP_*
SETUP_SQE128, SETUP_CQE32 = 1 << 10, 1 << 11
MAX_BUFFER_BYTES = 2**30  # of one registered buffer

SQE = np.dtype([
    ("opcode", "u1"), ("flags", "u1"), ("ioprio", "<u2"), ("fd", "<i4"), ("offset", "<u8"), ("address", "<u8"),
    ("length", "<u4"), ("rw_flags", "<u4"), ("user_data", "<u8"), ("buffer", "<u2"), ("personality", "<u2"),
    ("rest", "V20"),
])  # fmt: skip
CQE = np.dtype([("user_data", "<u8"), ("result", "<i4"), ("flags", "<u4")])


def _call(number: int, *arguments: object) -> int:
    """A system call; OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        number_ = ctypes.get_errno()
        raise OSError(number_, os.strerror(number_))
    return result


class Ring:
    """The two rings. entries of `sqe_bytes` (64, or 128 with SETUP_SQE128) each are filled by the caller in `sqes`."""

    __slots__ = ("fd", "entries", "sqes", "_maps", "_sq_tail", "_sq_mask", "_cq_head", "_cq_tail", "_cq_mask", "_cqes",
                 "_tail", "_enter")  # fmt: skip

    def __init__(self, depth: int, *, flags: int = 0) -> None:
        """Room for `depth` requests under way. OSError where the kernel does not allow it."""
        params = bytearray(120)
        struct.pack_into("<I", params, 8, flags)
        entries = 1 << max(0, depth - 1).bit_length()
        self.fd = _call(_SETUP, entries, (ctypes.c_char * 120).from_buffer(params))
        self._maps: list[mmap.mmap] = []
        try:
            sq_entries, cq_entries = struct.unpack_from("<2I", params, 0)
            features = struct.unpack_from("<I", params, 20)[0]
            if not (features & _FEATURE_SINGLE_MMAP and features & _FEATURE_EXT_ARG):
                raise OSError(errno.ENOSYS, "io_uring: expected Linux 5.11 or newer")
            _, sq_tail, sq_mask, _, _, _, array = struct.unpack_from("<7I", params, 40)
            cq_head, cq_tail, cq_mask, _, _, cqes = struct.unpack_from("<6I", params, 80)
            sqe_bytes = 128 if flags & SETUP_SQE128 else 64
            cqe_bytes = 32 if flags & SETUP_CQE32 else 16
            rings = self._map(max(array + 4 * sq_entries, cqes + cqe_bytes * cq_entries), 0)
            words = np.frombuffer(rings, np.uint32, len(rings) // 4)
            self.entries = sq_entries
            self._sq_tail, self._cq_head = words[sq_tail // 4 :][:1], words[cq_head // 4 :][:1]
            self._cq_tail = words[cq_tail // 4 :][:1]
            self._sq_mask, self._cq_mask = int(words[sq_mask // 4]), int(words[cq_mask // 4])
            words[array // 4 : array // 4 + sq_entries] = np.arange(sq_entries)
            raw = np.frombuffer(rings, np.uint8, cqe_bytes * cq_entries, cqes).reshape(cq_entries, cqe_bytes)
            self._cqes = raw[:, :16].view(CQE)[:, 0]
            sqes = self._map(sqe_bytes * sq_entries, _OFF_SQES)
            self.sqes = np.frombuffer(sqes, np.uint8, sqe_bytes * sq_entries).reshape(sq_entries, sqe_bytes)
            self._tail = int(self._sq_tail[0])
            libc = ctypes.CDLL(None, use_errno=True)
            libc.syscall.restype = ctypes.c_long
            self._enter = libc.syscall
        except BaseException:
            self.close()
            raise

    def _map(self, length: int, offset: int) -> mmap.mmap:
        shared = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(self.fd, length, flags=shared, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._maps.append(mapped)
        return mapped

    def register_buffers(self, buffers: Sequence[tuple[int, int]]) -> None:
        """Pins (address, bytes) once for all requests of *_FIXED. OSError where the limit of locked memory is lower."""
        vectors = np.array(buffers, np.uint64)
        _call(_REGISTER, self.fd, _REGISTER_BUFFERS, ctypes.c_void_p(vectors.ctypes.data), len(buffers))

    def places(self, count: int) -> np.ndarray:
        """Where in sqes the next `count` requests go."""
        return (self._tail + np.arange(count)) & self._sq_mask

    def push(self, count: int) -> None:
        """Hands the next `count` filled entries to the kernel."""
        self._tail = (self._tail + count) & 0xFFFFFFFF
        self._sq_tail[0] = self._tail
        while count:
            sent = self._enter(ctypes.c_long(_ENTER), self.fd, count, 0, 0, None, 0)
            if sent >= 0:
                count -= sent
            elif ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait(self, seconds: float, few: int = 1) -> None:
        """Until that many completions are there, at most so long."""
        if (int(self._cq_tail[0]) - int(self._cq_head[0])) & 0xFFFFFFFF >= few or seconds <= 0:
            return
        until = (ctypes.c_longlong * 2)(int(seconds), int(seconds % 1 * 1e9))
        argument = (ctypes.c_ulonglong * 3)(0, 0, ctypes.addressof(until))  # no signal mask; timeout's address
        flags = _GETEVENTS | _EXT_ARG
        result = self._enter(ctypes.c_long(_ENTER), self.fd, 0, few, flags, argument, ctypes.c_size_t(24))
        if result < 0 and ctypes.get_errno() not in (errno.EINTR, errno.ETIME):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def pop(self) -> np.ndarray:
        """The completions that are there: CQE [n]."""
        head, tail = int(self._cq_head[0]), int(self._cq_tail[0])
        count = (tail - head) & 0xFFFFFFFF
        ended = self._cqes[(head + np.arange(count)) & self._cq_mask]
        self._cq_head[0] = tail
        return ended

    def close(self) -> None:
        """Ends the ring. The kernel finishes what is under way into buffers that must outlive it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class IoUringReader:
    """Reads and writes of files by a Ring, with registered buffers where the limit of locked memory allows them."""

    __slots__ = ("name", "_ring", "_registered", "_under_way")

    def __init__(self, *, depth: int, buffers: Sequence[tuple[int, int]] = ()) -> None:
        """As open_reader() says. OSError where the kernel does not allow it."""
        if depth < 1:
            raise ValueError(f"depth: expected >= 1, got {depth}")
        self._ring = Ring(depth)
        self._under_way = 0
        self._registered: tuple[tuple[int, int], ...] = ()
        pieces = [(address + at, min(MAX_BUFFER_BYTES, length - at)) for address, length in buffers
                  for at in range(0, length, MAX_BUFFER_BYTES)]  # fmt: skip
        if pieces:
            try:
                self._ring.register_buffers(pieces)
                self._registered = tuple(pieces)
            except OSError as error:
                if error.errno not in (errno.ENOMEM, errno.EPERM, errno.EFAULT, errno.EOPNOTSUPP):
                    raise
        self.name = "io_uring, registered buffers" if self._registered else "io_uring"

    def submit(self, requests: Sequence[Request]) -> None:
        for begin in range(0, len(requests), self._ring.entries):
            self._push(requests[begin : begin + self._ring.entries])

    def _push(self, requests: Sequence[Request]) -> None:
        tags, fds, offsets, addresses, lengths, writes = zip(*requests)
        buffers = self._buffers(np.array(addresses, np.int64), np.array(lengths, np.int64))
        fixed = buffers >= 0
        entries = np.zeros(len(requests), SQE)
        entries["opcode"] = np.where(writes, np.where(fixed, WRITE_FIXED, WRITE), np.where(fixed, READ_FIXED, READ))
        entries["fd"], entries["offset"], entries["address"] = fds, offsets, addresses
        entries["length"], entries["user_data"], entries["buffer"] = lengths, tags, np.maximum(buffers, 0)
        self._ring.sqes[self._ring.places(len(requests))] = entries.view(np.uint8).reshape(len(requests), 64)
        self._ring.push(len(requests))
        self._under_way += len(requests)

    def _buffers(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The registered buffer that holds each request's, -1 where none does, int64 [n]."""
        found = np.full(len(addresses), -1)
        for at, (begin, length) in enumerate(self._registered):
            found[(begin <= addresses) & (addresses + lengths <= begin + length)] = at
        return found

    def poll(self, wait_s: float, few: int = 1) -> list[Done]:
        if not self._under_way:
            return []
        self._ring.wait(wait_s, min(few, self._under_way))
        ended = self._ring.pop()
        self._under_way -= len(ended)
        return [Done(tag, result) for tag, result in zip(ended["user_data"].tolist(), ended["result"].tolist())]

    def close(self) -> None:
        self._ring.close()
