"""What a GPU test needs beyond a GPU: tests skip where it is not there, and say what it is."""
from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu.kernels.this_gpu import this_gpu
from gpu.routes.flashinfer_builds import build_failure

_unbuilt: dict[str, str] = {}  # what was found missing in this process, by the test's name of it


@contextlib.contextmanager
def flashinfer_kernels(name: str) -> Iterator[None]:
    """Around what runs FlashInfer's kernels. name: of the kernels, so that what is missing is tried once."""
    if name in _unbuilt:
        pytest.skip(_unbuilt[name])
    try:
        yield
    except Exception as error:
        missing = build_failure(error)
        if missing is None:
            raise
        _unbuilt[name] = missing
        pytest.skip(missing)


def flashinfer_can_build(toolkit: Path = Path("/usr/local/cuda")) -> bool:
    """Whether ninja and nvcc are where FlashInfer 0.7 looks for them. toolkit: where it looks last."""
    found = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (Path(found).parents[1] if found else toolkit)
    nvcc = os.environ.get("FLASHINFER_NVCC") or home / Path("bin/nvcc")
    return shutil.which("ninja") is not None and shutil.which(nvcc) is not None


def skip_below(num_bytes: int) -> None:
    """Skips the test on a GPU that has less memory."""
    gpu = this_gpu()
    if gpu.memory_bytes < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.1f} GiB of GPU memory, {gpu} has {gpu.memory_bytes / 2**30:.1f}")
