import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import os

import pytest
from streams_on_cpu import fake  # noqa: F401, of whoever names it


@pytest.fixture
def soak_requests():
    """How many requests a soak serves: POOL_SOAK=20000 for the long one."""
    return int(os.environ.get("POOL_SOAK", "600"))
