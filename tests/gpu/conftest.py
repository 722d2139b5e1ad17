"""Every test in this folder needs a CUDA device with CuPy and PyTorch, and is skipped without one."""
from __future__ import annotations

import importlib.util

import pytest


def _missing() -> str | None:
    for module in ("torch", "cupy"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


MISSING = _missing()
# Modules that import torch or cupy at the top cannot even be collected without them.
collect_ignore_glob = ["*/test_*.py"] if MISSING else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
