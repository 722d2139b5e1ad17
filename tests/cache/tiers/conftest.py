import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import os

import pytest


@pytest.fixture
def soak_requests():
    """How many requests a soak serves: POOL_SOAK=20000 for the long one."""
    return int(os.environ.get("POOL_SOAK", "600"))
