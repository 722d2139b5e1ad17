"""Which cases of a parametrized test every run takes, and which only `make test-slow`."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


def slow_unless(often: Callable[..., bool], cases: Iterable) -> list:
    """Parameters of a test of one argument: slow where often(case) is false."""
    return [pytest.param(case, marks=[] if often(case) else [pytest.mark.slow]) for case in cases]


def slow_unless_of(often: Callable[..., bool], cases: Iterable[tuple]) -> list:
    """Parameters of a test of several arguments: slow where often(*case) is false."""
    return [pytest.param(*case, marks=[] if often(*case) else [pytest.mark.slow]) for case in cases]
