"""Compiles cuda_src. The only file that does; importing it needs neither CuPy nor a GPU."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cuda_src
from gpu.kernels import fields

if TYPE_CHECKING:
    import cupy

    from gpu.kernels.launch import Kernel

SOURCE_DIR = Path(cuda_src.__file__).parent
_ASKING = threading.Lock()  # of CuPy's choice of an architecture


@functools.cache
def source_hash() -> str:
    """SHA-256 over the names and contents of all CUDA sources, hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCE_DIR.glob("*.cu"), *SOURCE_DIR.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_options(defines: dict[str, int | str]) -> tuple[str, ...]:
    """NVRTC options of a variant. The source hash is one: CuPy's disk cache does not look into included headers."""
    return ("-std=c++20", f"-I{SOURCE_DIR}", f"-DPKV_SOURCE_HASH={source_hash()[:16]}",
            *(f"-D{name}={value}" for name, value in sorted(defines.items())))


def needs_own_architecture(defines: dict[str, int | str]) -> bool:
    """Whether a variant has instructions that its architecture alone has, and none after it (wgmma: sm_90a)."""
    return bool(defines.get("READ_TILES"))


@functools.cache
def _load(file_name: str, defines: tuple[tuple[str, int | str], ...]) -> cupy.RawModule:
    import cupy

    module = cupy.RawModule(code=(SOURCE_DIR / file_name).read_text(), options=compile_options(dict(defines)))
    if needs_own_architecture(dict(defines)):
        with _architecture_alone(cupy.cuda.compiler):
            module.compile()
    return module


@contextlib.contextmanager
def _architecture_alone(compiler: object) -> Iterator[None]:
    """Has CuPy compile for sm_90a and the like. CuPy 13 and 14 have no option for it, and ask this function of theirs
    for every compilation and for the name that it is kept under on disk. One thread at a time: another would ask what
    this one has put there, and leave it there."""
    with _ASKING:
        asked = compiler._get_arch_for_options_for_nvrtc
        option, method = asked()
        compiler._get_arch_for_options_for_nvrtc = lambda arch=None: (option + "a", method)
        try:
            yield
        finally:
            compiler._get_arch_for_options_for_nvrtc = asked


def load_module(file_name: str, defines: dict[str, int | str]) -> cupy.RawModule:
    """The compiled module of one .cu file and one set of constants; compiled once per process, cached on disk."""
    return _load(file_name, tuple(sorted(defines.items())))


def load_kernel(file_name: str, kernel_name: str, defines: dict[str, int | str], *, threads: int,
                shared_bytes: int = 0, overlap: bool = False, given: tuple[str, ...] | None = None) -> Kernel:
    """A kernel of `file_name`, ready to launch in CTAs of `threads` with `shared_bytes` of dynamic shared memory.

    overlap: programmatic dependent launch, for kernels that wait for the previous one themselves (sm_90 and newer).
    given: the names of the values that each launch is given, in their order: all that gpu.kernels.fields lists for the
    kernel's variant, and others that it leaves alone; by default just those, in the table's order.
    """
    from gpu.kernels.launch import Kernel
    from gpu.kernels.this_gpu import this_gpu
    from gpu.kernels.variant import shared_limit_bytes

    limit = shared_limit_bytes(this_gpu().compute_capability)
    if shared_bytes > limit:
        raise ValueError(f"shared_bytes: expected at most {limit} on {this_gpu()}, got {shared_bytes} of {kernel_name}")
    raw = load_module(file_name, defines).get_function(kernel_name)
    if shared_bytes:
        # Every launch of the function has it, those of an earlier call with more room too.
        raw.max_dynamic_shared_size_bytes = max(shared_bytes, raw.max_dynamic_shared_size_bytes)
    return Kernel(raw.kernel, fields.signature(kernel_name, defines), threads=threads, shared_bytes=shared_bytes,
                  overlap=overlap, order=fields.order(kernel_name, defines, given))
