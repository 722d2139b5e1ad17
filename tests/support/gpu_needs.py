"""What a GPU test needs beyond a GPU: tests skip where it is not there, and say what it is."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


def skip_below(num_bytes: int) -> None:
    """Skips the test on a GPU that has less memory."""
    gpu = this_gpu()
    if gpu.memory_bytes < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.1f} GiB of GPU memory, {gpu} has {gpu.memory_bytes / 2**30:.1f}")
