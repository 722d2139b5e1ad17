"""What the engine needs to know of an array, whichever library made it: CuPy, torch or NumPy. Nothing is copied."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class ArrayView:
    """A described array."""

    pointer: int
    library: str  # "numpy", "cupy" or "torch"
    device: int  # -1 on the host
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def __str__(self) -> str:
        place = "host" if self.device < 0 else f"cuda:{self.device}"
        return f"{self.dtype} {list(self.shape)} on {place}"


def fingerprint(array: object) -> tuple:
    """(address, what validation depends on) of an array on the GPU, without describing it; (0, its type) otherwise.

    Two arguments of equal second parts pass or fail the same checks: the cheap test of a step's every call. None has
    a second part of its own, so an array that is not on a GPU never passes for one that was not given.
    """
    if array is None:
        return 0, None
    if _is_torch(array):
        address = array.data_ptr()
        return address, (array.dtype, array.device, array.shape, array.stride(), address % 16)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        address = array.data.ptr
        return address, (array.dtype, array.device.id, array.shape, array.strides, address % 16)
    return 0, type(array)


def fingerprints(given: Iterable[object]) -> tuple[list[int], list]:
    """(addresses, what validation depends on) of some arrays, as fingerprint() of each."""
    torch = sys.modules.get("torch")
    tensor = None if torch is None else torch.Tensor
    addresses, keys = [], []
    for array in given:
        if type(array) is tensor:  # written out: this is most of the host time of a step
            address = array.data_ptr()
            key = array.dtype, array.device, array.shape, array.stride(), address % 16
        else:
            address, key = (0, None) if array is None else fingerprint(array)
        addresses.append(address)
        keys.append(key)
    return addresses, keys


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
        return ArrayView(array.ctypes.data, "numpy", -1, array.dtype.name, array.shape,
                         tuple(s // size for s in array.strides))
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        size = array.itemsize
        return ArrayView(array.data.ptr, "cupy", array.device.id, array.dtype.name, array.shape,
                         tuple(s // size for s in array.strides))
    raise ValueError(f"{name}: expected a NumPy, CuPy or torch array, got {type(array).__name__}")


def to_host(name: str, array: Any) -> np.ndarray:
    """A NumPy array with the same contents; synchronises when the array is on a GPU."""
    if _is_torch(array):
        return array.detach().cpu().numpy()
    if isinstance(array, (list, tuple)):
        return np.asarray(array)
    described = view(name, array)
    return array if described.library == "numpy" else array.get()


def to_gpu(name: str, array: object) -> tuple[object, int]:
    """(the array to keep alive, its address on the GPU): itself when it is there, a copy when it is on the host."""
    described = view(name, array)
    if described.device >= 0:
        return array, described.pointer
    import cupy

    copy = cupy.asarray(to_host(name, array))
    return copy, copy.data.ptr


def shape_of(name: str, array: object) -> tuple[int, ...]:
    """As view(name, array).shape, without describing the rest of a tensor."""
    return array.shape if _is_torch(array) else view(name, array).shape


def empty_like(model: object, shape: tuple[int, ...], dtype: str) -> object:
    """An uninitialised array of the same library and device as `model`."""
    if _is_torch(model):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=model.device)
    import cupy

    return cupy.empty(shape, dtype=dtype)


def split_combined(k_pages: object) -> tuple[object, object]:
    """(K, V) as views of a combined cache [num_pages, 2, ...]. Raises ValueError naming v_pages."""
    shape = shape_of("k_pages", k_pages)
    if len(shape) != 5 or shape[1] != 2:
        raise ValueError(f"v_pages: expected pages, or a combined k_pages [num_pages, 2, ...], got None and "
                         f"{list(shape)}")
    return k_pages.unbind(1) if _is_torch(k_pages) else (k_pages[:, 0], k_pages[:, 1])


def current_stream(library: str | None, device: int) -> int:
    """Handle of the caller's current stream in the library its arrays come from (CuPy's when that is not known)."""
    if library == "torch":
        import torch

        return torch._C._cuda_getCurrentRawStream(device)  # without a torch.cuda.Stream made for it, as Triton asks
    import cupy

    return cupy.cuda.get_current_stream().ptr


def is_capturing(stream: int) -> bool:
    """Whether what is launched on the stream of that handle goes into a CUDA graph."""
    import cupy

    return bool(cupy.cuda.runtime.streamIsCapturing(stream))


def capture_number(stream: int) -> int:
    """The number of the capture into which the stream's launches go, unlike any other's; 0 outside of any."""
    if not is_capturing(stream):
        return 0
    from gpu.kernels.launch import capture_id

    return capture_id(stream)


@contextlib.contextmanager
def on_stream(library: str | None, device: int) -> Iterator[object]:
    """Makes that stream CuPy's current one: copies and allocations inside are ordered on it."""
    import cupy

    if library != "torch":
        yield cupy.cuda.get_current_stream()
        return
    import torch

    own = torch.cuda.current_stream(device)
    # ExternalStream is deprecated from CuPy 14 on.
    make = getattr(cupy.cuda.Stream, "from_external", None)
    with make(own) if make else cupy.cuda.ExternalStream(own.cuda_stream) as stream:
        yield stream
