"""C++ of the kernels' headers as a library for ctypes."""
from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from gpu.kernels.compile import SOURCE_DIR

COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
STRICT = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE_DIR}")


def build(source: Path, to: Path, *options: str) -> ctypes.CDLL:
    """Skips the test without a compiler; fails it with the compiler's words."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    command = [COMPILER, *options, "-shared", "-fPIC", "-o", to, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(to))
