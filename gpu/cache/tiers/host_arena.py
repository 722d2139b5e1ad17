"""Host memory in slots on 4 KiB boundaries, on a NUMA node of choice, pinned for the GPU where there is one."""
from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from gpu.cache.tiers.host_room import free_host_bytes

ALIGNMENT = 4096  # bytes: of O_DIRECT's buffers, offsets and lengths on every device met
CHUNK_BYTES = 2**30  # of one cudaHostRegister call; slots do not cross one
_MBIND, _MPOL_BIND = {"x86_64": 237, "aarch64": 235}.get(os.uname().machine), 2


def round_up(num_bytes: int) -> int:
    """To a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def view(address: int, num_bytes: int) -> memoryview:
    """Bytes of this process at an address, which its owner keeps."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def numa_nodes() -> list[int]:
    """The machine's nodes with memory; [0] where the kernel tells none."""
    try:
        text = Path("/sys/devices/system/node/has_memory").read_text().strip()
    except OSError:
        return [0]
    nodes: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes or [0]


class HostArena:
    """`slots` buffers of slot_bytes, each on a 4 KiB boundary.

    Memory is mapped, bound to the node, touched and then registered with CUDA in chunks, so that it lies where it was
    asked for and page faults are over before the first copy.
    """

    __slots__ = ("slots", "slot_bytes", "node", "_map", "_base", "_per_chunk", "_registered", "_kept")

    def __init__(self, *, slots: int, slot_bytes: int, node: int | None = None, pin: bool = False) -> None:
        """node: of NUMA, None for any. pin: registers with CUDA, by CuPy. Raises ValueError naming the argument."""
        if slots < 1 or slot_bytes < 1:
            raise ValueError(f"slots, slot_bytes: expected >= 1, got {slots}, {slot_bytes}")
        if node is not None and node not in numa_nodes():
            raise ValueError(f"node: expected one of {numa_nodes()}, got {node}")
        self.slots, self.slot_bytes, self.node = slots, round_up(slot_bytes), node
        chunk_bytes = max(CHUNK_BYTES // self.slot_bytes, 1) * self.slot_bytes
        self._per_chunk = chunk_bytes // self.slot_bytes
        length = slots * self.slot_bytes
        self._registered: list[int] = []
        self._kept = False
        free = free_host_bytes(node)
        if length > free:  # Linux grants it all the same, and ends the process when it is touched
            raise ValueError(f"slots: {length:,} bytes of host memory cannot be had: {free:,} are free")
        try:
            self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ValueError(f"slots: {length} bytes of host memory cannot be had: {error}") from error
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        with contextlib.suppress(AttributeError, OSError):  # huge pages are a help, no need
            self._map.madvise(mmap.MADV_HUGEPAGE)
        if node is not None and len(numa_nodes()) > 1:
            self._bind(length, node)
        np.frombuffer(self._map, np.uint8)[::ALIGNMENT] = 0
        if pin:
            self._register(length, chunk_bytes)

    def _bind(self, length: int, node: int) -> None:
        if _MBIND is None:
            raise ValueError(f"node: expected None on {os.uname().machine}, whose mbind is not known here")
        mask = (ctypes.c_ulong * 16)()
        mask[node // 64] = 1 << node % 64
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (ctypes.c_void_p(self._base), ctypes.c_ulong(length), _MPOL_BIND, mask, ctypes.c_ulong(1024), 0)
        if libc.syscall(ctypes.c_long(_MBIND), *arguments):
            raise ValueError(f"node: memory cannot be bound to {node}: {os.strerror(ctypes.get_errno())}")

    def _register(self, length: int, chunk_bytes: int) -> None:
        try:
            import cupy

            for at in range(0, length, chunk_bytes):
                cupy.cuda.runtime.hostRegister(self._base + at, min(chunk_bytes, length - at), 0)
                self._registered.append(self._base + at)
        except Exception as error:  # of CUDA, or of CuPy that is not there
            self.close()
            raise ValueError(f"pin: {length:,} bytes of host memory cannot be registered with CUDA: {error}") from error

    @property
    def region(self) -> tuple[int, int]:
        """(address, bytes) of all of it."""
        return self._base, self.slots * self.slot_bytes

    def address(self, slot: int) -> int:
        """Of a slot's first byte."""
        return self._base + slot * self.slot_bytes

    def addresses(self, slots: np.ndarray) -> np.ndarray:
        """Of slots [n], int64 [n]."""
        return self._base + np.asarray(slots, np.int64) * self.slot_bytes

    def bytes_of(self, slot: int) -> memoryview:
        """A slot's bytes."""
        return view(self.address(slot), self.slot_bytes)

    def span(self, slot: int, count: int) -> memoryview:
        """The bytes of `count` slots from one on."""
        return view(self.address(slot), count * self.slot_bytes)

    def keep(self) -> None:
        """Never gives the memory back: a device that stalled may still write to it."""
        self._kept = True

    def close(self) -> None:
        """Unregisters it and gives the memory back to the machine; who looks at it afterwards sees zeros."""
        if self._registered and not self._kept:
            import cupy

            for address in self._registered:
                cupy.cuda.runtime.hostUnregister(address)
        self._registered = []
        if not self._kept:
            with contextlib.suppress(OSError):  # where it is locked it goes with the mapping
                self._map.madvise(mmap.MADV_DONTNEED)
        else:
            # The mapping outlives the last name that this process has for it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._map))
