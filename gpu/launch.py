"""Launches a compiled kernel through the driver. CuPy's own launch cannot ask for programmatic dependent launch."""
from __future__ import annotations

import ctypes
import functools
import re

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_*, cuda.h


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


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


C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}


def _arguments(signature: str) -> tuple[list, list[int]]:
    """The values of a signature in order, each a ctypes object to set, and the addresses of its parameters."""
    values, parameters = [], []
    for part in re.findall(r"\[[piqf]+\]|[piqf]", signature):
        fields = [(f"field{index}", C_TYPES[letter]) for index, letter in enumerate(part.strip("[]"))]
        structure = type("_Parameter", (ctypes.Structure,), {"_fields_": fields})
        memory = structure()
        start = ctypes.addressof(memory)
        parameters.append(start)
        for name, kind in fields:
            value = kind.from_buffer(memory, getattr(structure, name).offset)  # keeps the memory alive
            values.append(value)
    return values, parameters


class Kernel:
    """One kernel and its launch configuration.

    signature: a letter per value, p address, i int32, q int64, f float32; those in brackets are one parameter, a C
    structure. The argument buffers are made once, since a step's host time is mostly this call.
    """

    __slots__ = ("_function", "_handle", "_config", "_config_ref", "_attribute", "_values", "_pointers", "_launch")

    def __init__(self, function: object, signature: str, *, threads: int, shared_bytes: int, overlap: bool) -> None:
        self._function = function  # keeps the module loaded
        self._handle = ctypes.c_void_p(function.ptr)
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = _Config(
            (0, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(self._attribute), int(overlap)
        )
        self._config_ref = ctypes.byref(self._config)
        self._values, parameters = _arguments(signature)
        self._pointers = (ctypes.c_void_p * len(parameters))(*parameters)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, grid: int | tuple[int, int], args: tuple[int | float, ...], stream: int) -> None:
        """Launches on the stream of that handle, with one int or float per letter of the signature."""
        for value, arg in zip(self._values, args, strict=True):
            value.value = arg
        config = self._config
        config.grid[0], config.grid[1] = grid if isinstance(grid, tuple) else (grid, 1)
        config.stream = stream
        status = self._launch(self._config_ref, self._handle, self._pointers, None)
        if status:
            name = ctypes.c_char_p()
            _driver().cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"launch failed: {(name.value or b'unknown error').decode()} ({status})")
