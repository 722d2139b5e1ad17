import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import math
import os

import pytest
from streams_on_cpu import fake  # noqa: F401, of whoever names it

from gpu.cache.tiers import load_parts


@pytest.fixture(params=["caller", "aside"])
def who_asks(request, monkeypatch):
    """For copies of host memory's blocks: the caller's thread, as of short loads, or one of the cache."""
    monkeypatch.setattr(load_parts, "LONG_LOAD_BYTES", 0 if request.param == "aside" else math.inf)


@pytest.fixture
def soak_requests():
    """How many requests a soak serves: POOL_SOAK=20000 for the long one."""
    return int(os.environ.get("POOL_SOAK", "600"))
