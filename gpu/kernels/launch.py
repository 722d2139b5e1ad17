"""Launches a compiled kernel through the driver. CuPy's own launch cannot ask for programmatic dependent launch."""
from __future__ import annotations

import ctypes
import functools
import operator
import re
import struct

_PROGRAMMATIC_STREAM_SERIALIZATION, _CLUSTER_DIMENSION = 6, 4  # CU_LAUNCH_ATTRIBUTE_*, cuda.h
_GRID = struct.Struct("2I")  # the first two numbers of _Config


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 3), ("rest", ctypes.c_char * 52)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def capture_id(stream: int) -> int:
    """The driver's number of the capture on the stream of that handle."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    failed = _driver().cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number),
                                                 None, None, None)  # fmt: skip
    if failed:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed: {failed}")
    return number.value


class Arguments:
    """Memory of a kernel's parameters, laid out as C does: see Kernel for the signature.

    write(*values): one per letter; struct.error where there are more or fewer, or one is no such number.
    """

    __slots__ = ("starts", "num_bytes", "write")

    def __init__(self, signature: str) -> None:
        layout, offsets = "", []
        for part in re.findall(r"\[[piqf]+\]|[piqf]", signature):
            aligned = "0P" if part[0] == "[" else ""  # a structure begins and ends where its widest member may
            letters = part.strip("[]").replace("p", "P")
            offsets.append(struct.calcsize(layout + (aligned or "0" + letters)))
            layout += aligned + letters + aligned
        self.num_bytes = struct.calcsize(layout)
        memory = (ctypes.c_longlong * -(-self.num_bytes // 8))()
        self.starts = tuple(ctypes.addressof(memory) + offset for offset in offsets)  # of each parameter
        self.write = functools.partial(struct.Struct(layout).pack_into, memory, 0)


class Kernel:
    """One kernel and its launch configuration.

    signature: a letter per value, p address, i int32, q int64, f float32; those in brackets are one parameter, a C
    structure. What a launch is told is kept from one to the next, since a step's host time is mostly this call.
    order: where among the values of a call each letter's is, by default in the same order.
    overlap: programmatic dependent launch.
    """

    __slots__ = (
        "_function", "_handle", "_config", "_config_ref", "_attributes", "_overlap", "_arguments", "_pointers", "_pick",
        "_launch",
    )  # fmt: skip

    def __init__(self, function: object, signature: str, *, threads: int, shared_bytes: int, overlap: bool,
                 order: tuple[int, ...] | None = None) -> None:
        self._function = function  # keeps the module loaded
        self._handle = ctypes.c_void_p(function.ptr)
        self._attributes = (_Attribute * 2)(
            _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)), _Attribute(_CLUSTER_DIMENSION, 0, (2, 1, 1))
        )
        self._overlap = int(overlap)
        self._config = _Config((0, 1, 1), (threads, 1, 1), shared_bytes, None, self._attributes, self._overlap)
        self._config_ref = ctypes.byref(self._config)
        self._arguments = Arguments(signature)
        self._pointers = (ctypes.c_void_p * len(self._arguments.starts))(*self._arguments.starts)
        self._pick = None if order is None else operator.itemgetter(*order)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, grid: int | tuple[int, int], args: tuple[int | float, ...], stream: int,
                 pairs: bool = False) -> None:
        """Launches on the stream of that handle, with one int or float per letter of the signature.

        pairs, with overlap: CTAs 2 i and 2 i + 1 go to neighbouring SMs, as a cluster; a grid of an odd number goes
        where it will.
        """
        self._arguments.write(*(args if self._pick is None else self._pick(args)))
        _GRID.pack_into(self._config, 0, *(grid if isinstance(grid, tuple) else (grid, 1)))
        self._config.stream = stream
        self._config.num_attributes = self._overlap + (pairs and self._overlap and self._config.grid[0] % 2 == 0)
        status = self._launch(self._config_ref, self._handle, self._pointers, None)
        if status:
            name = ctypes.c_char_p()
            _driver().cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"launch failed: {(name.value or b'unknown error').decode()} ({status})")
