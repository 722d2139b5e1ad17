"""What the engine needs to know of an array, whichever library made it: CuPy, torch or NumPy. Nothing is copied."""
from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ArrayView:
    """A described array. `layout` alone decides whether a call is valid, so it is what validation caches."""

    pointer: int
    library: str  # "numpy", "cupy" or "torch"
    device: int  # -1 on the host
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @property
    def layout(self) -> tuple:
        return self.library, self.device, self.dtype, self.shape, self.strides, self.pointer % 16

    def __str__(self) -> str:
        place = "host" if self.device < 0 else f"cuda:{self.device}"
        return f"{self.dtype} {list(self.shape)} on {place}"


def _is_torch(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def view(name: str, array: object) -> ArrayView:
    """Describes an array; `name` is the argument that a ValueError will name."""
    if _is_torch(array):
        device = array.device.index if array.device.type == "cuda" else -1
        return ArrayView(array.data_ptr(), "torch", device, str(array.dtype).removeprefix("torch."), tuple(array.shape),
                         array.stride())
    if isinstance(array, np.ndarray):
        size = array.itemsize
        return ArrayView(array.ctypes.data, "numpy", -1, array.dtype.name, array.shape, tuple(s // size for s in array.strides))
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        size = array.itemsize
        return ArrayView(array.data.ptr, "cupy", array.device.id, array.dtype.name, array.shape,
                         tuple(s // size for s in array.strides))
    raise ValueError(f"{name}: expected a NumPy, CuPy or torch array, got {type(array).__name__}")


def to_host(name: str, array: object) -> np.ndarray:
    """A NumPy array with the same contents; synchronises when the array is on a GPU."""
    if _is_torch(array):
        return array.detach().cpu().numpy()
    if isinstance(array, (list, tuple)):
        return np.asarray(array)
    described = view(name, array)
    return array if described.library == "numpy" else array.get()


def to_cupy(name: str, array: object) -> object:
    """The array on the current GPU: itself or, for torch on the GPU, the same memory; host arrays are copied."""
    import cupy

    if _is_torch(array):
        if array.device.type != "cuda":
            return cupy.asarray(array.numpy())
        return cupy.ndarray(tuple(array.shape), dtype=str(array.dtype).removeprefix("torch."),
                            memptr=cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(array.data_ptr(), array.nbytes, array), 0),
                            strides=tuple(s * array.element_size() for s in array.stride()))
    if isinstance(array, (list, tuple)):
        array = np.asarray(array, dtype=np.int32)
    view(name, array)
    return cupy.asarray(array)


def empty_like(model: object, described: ArrayView, shape: tuple[int, ...], dtype: str) -> object:
    """An uninitialised array of the same library and device as `model`."""
    if described.library == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=model.device)
    import cupy

    return cupy.empty(shape, dtype=dtype)


_streams: dict[int, object] = {}


def current_stream(library: str) -> object:
    """The caller's current stream in the library its arrays come from, as a CuPy stream."""
    import cupy

    if library != "torch":
        return cupy.cuda.get_current_stream()
    import torch

    handle = torch.cuda.current_stream().cuda_stream
    stream = _streams.get(handle)
    if stream is None:
        # ExternalStream is deprecated from CuPy 14 on, where Stream.from_external() replaces it.
        stream = _streams[handle] = cupy.cuda.Stream.from_external(torch.cuda.current_stream()) if hasattr(cupy.cuda.Stream, "from_external") else cupy.cuda.ExternalStream(handle)
    return stream
