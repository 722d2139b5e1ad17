"""Ranks that share a GPU poll for each other and keep it busy: their tests have it for themselves."""
from __future__ import annotations

import os

import pytest

# Streams of ranks that share a GPU must not wait for each other in one of its queues. It is read when CUDA begins.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@pytest.fixture(autouse=True, scope="session")
def alone() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("runs in a process of its own, beside no other worker: python -m pytest tests/gpu/several")
