"""NVRTC from its wheel, through ctypes: what the engine's compiler says of a kernel, on a machine without a GPU."""
from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path


def _wheel_file(wheel: str, name: str) -> Path:
    """A file of an installed wheel; PackageNotFoundError when the wheel is missing."""
    for file in files(wheel) or ():
        if re.fullmatch(name, file.name):
            return Path(file.locate())
    raise FileNotFoundError(f"{wheel}: no file {name}")


INCLUDE_DIR = _wheel_file("nvidia-cuda-runtime-cu12", r"cuda_fp16\.h").parent


@functools.cache
def _library() -> ctypes.CDLL:
    path = _wheel_file("nvidia-cuda-nvrtc-cu12", r"libnvrtc\.so\.\d+")
    # NVRTC opens its builtins by name alone; loaded first, they are found whatever the search path.
    ctypes.CDLL(str(_wheel_file("nvidia-cuda-nvrtc-cu12", r"libnvrtc-builtins\.so\.[\d.]+")), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas gave a kernel, in registers per thread and bytes."""

    registers: int
    stack: int
    spills: int  # stores and loads together
    static_shared: int


def _ask(program: ctypes.c_void_p, what: str) -> bytes:
    """One of the program's outputs: nvrtcGet<what>, sized by nvrtcGet<what>Size."""
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _check(status: int, doing: str) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {doing}: status {status}")


def _compile(source: Path, options: tuple[str, ...], output: str) -> tuple[bytes, str]:
    """(nvrtcGet<output>, log). Raises RuntimeError with the log when the source does not compile."""
    nvrtc, program = _library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None),
           "create")
    try:
        options = (*options, f"-I{INCLUDE_DIR}")
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = _ask(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise RuntimeError(f"{source.name}: {' '.join(options)}\n{log}")
        return _ask(program, output), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def ptx(source: Path, capability: int, options: tuple[str, ...]) -> str:
    """PTX of a source for a compute capability (major * 10 + minor)."""
    return _compile(source, (*options, f"--gpu-architecture=compute_{capability}"), "PTX")[0].rstrip(b"\0").decode()


def compiled(source: Path, capability: int, options: tuple[str, ...]) -> tuple[bytes, dict[str, Resources]]:
    """Machine code for a compute capability (an ELF file), and what each of its kernels takes, by name.

    Raises ValueError when the log does not say: a check that found nothing to check must not pass.
    """
    alone = "a" if any(re.fullmatch(r"-DREAD_TILES=[^0]\d*", option) for option in options) else ""
    options = (*options, f"--gpu-architecture=sm_{capability}{alone}", "--ptxas-options=-v")
    cubin, log = _compile(source, options, "CUBIN")
    # "... entry function 'NAME' for 'sm_90'", then that kernel's lines until the next entry.
    _, *entries = re.split(r"Compiling entry function '(\w+)'", log)
    if not cubin or not entries:
        raise ValueError(f"{source.name}: no kernel in the log of ptxas: {log!r}")
    return cubin, {name: _resources(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def kernel_resources(source: Path, capability: int, options: tuple[str, ...]) -> dict[str, Resources]:
    """What each kernel takes, by name; raises as compiled()."""
    return compiled(source, capability, options)[1]


def _resources(text: str) -> Resources:
    """Reads one kernel's lines of `ptxas -v`; it leaves out shared memory of 0 bytes, and nothing else."""
    found = {}
    for name, pattern in (("registers", r"Used (\d+) registers"), ("stack", r"(\d+) bytes stack frame"),
                          ("stores", r"(\d+) bytes spill stores"), ("loads", r"(\d+) bytes spill loads")):
        match = re.search(pattern, text)
        if not match:
            raise ValueError(f"no {name} in the log of ptxas: {text!r}")
        found[name] = int(match[1])
    shared = re.search(r"(\d+) bytes smem", text)
    return Resources(
        found["registers"], found["stack"], found["stores"] + found["loads"], int(shared[1]) if shared else 0
    )
