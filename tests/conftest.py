"""Fixtures of tests in more than one room."""
from __future__ import annotations

import pytest


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)],
                ids=["reads by warps", "reads by warpgroups"])
def warpgroup_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """gpu.kernels.variant.WARPGROUP_READS, one way and then the other."""
    monkeypatch.setattr("gpu.kernels.variant.WARPGROUP_READS", request.param)
    return request.param
