"""Launches a compiled kernel through the driver. CuPy's own launch cannot ask for programmatic dependent launch."""
from __future__ import annotations

import ctypes
import functools

import numpy as np

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_*, cuda.h


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint)]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


_C_TYPES = {np.dtype(np.int32): ctypes.c_int, np.dtype(np.int64): ctypes.c_longlong, np.dtype(np.float32): ctypes.c_float}


class Kernel:
    """One kernel and its launch configuration. Arguments keep their types from call to call."""

    __slots__ = ("_function", "_config", "_attribute", "_values", "_pointers")

    def __init__(self, function: object, *, threads: int, shared_bytes: int, overlap: bool) -> None:
        self._function = function
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = _Config((0, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(self._attribute), int(overlap))
        self._values: list = []
        self._pointers = None

    def __call__(self, grid: int | tuple[int, int], args: tuple, stream: object) -> None:
        """Launches on `stream`. args: addresses (int), CuPy arrays, or NumPy scalars of int32, int64, float32."""
        if not self._values:
            self._values = [_C_TYPES[a.dtype]() if isinstance(a, np.generic) else ctypes.c_void_p() for a in args]
            self._pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(v) for v in self._values))
        for value, arg in zip(self._values, args):
            value.value = arg if isinstance(arg, int) else arg.item() if isinstance(arg, np.generic) else arg.data.ptr
        config = self._config
        config.grid[0], config.grid[1] = grid if isinstance(grid, tuple) else (grid, 1)
        config.stream = stream.ptr
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self._function.ptr), self._pointers, None)
        if status:
            name = ctypes.c_char_p()
            _driver().cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"launch failed: {(name.value or b'unknown error').decode()} ({status})")
