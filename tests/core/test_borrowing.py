"""What counts no references gives none away: its functions hand no arrays to Python, which would free them early."""
from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numba.core import types
from numba.core.dispatcher import Dispatcher
from numba.core.errors import TypingError
from serving_cases import DEVICE, MODEL, poisson_trace

from pkvsim.compiled import compiled, parts
from pkvsim.serving.simulate import simulate


def has_arrays(kind: Any) -> bool:
    if isinstance(kind, types.BaseTuple):
        return any(has_arrays(one) for one in kind.types)
    return isinstance(kind, types.Array)


def test_entry_points_return_numbers() -> None:
    simulate(poisson_trace(4, 4, 500, 3, seed=2), MODEL, DEVICE, "balanced")
    seen = [
        (name, overload.signature.return_type)
        for module in list(sys.modules.values()) if module.__name__.startswith("pkvsim.")
        for name, value in list(vars(module).items()) if isinstance(value, Dispatcher)
        and value.targetoptions.get("_nrt") is False and not value.targetoptions.get("no_cpython_wrapper")
        for overload in value.overloads.values()
    ]  # fmt: skip
    assert "advance" in {name for name, _ in seen}
    assert not [name for name, kind in seen if has_arrays(kind)]


def test_they_cannot_make_arrays() -> None:
    @compiled
    def room(rows):
        return np.zeros(rows)[0]

    with pytest.raises(TypingError):
        room(3)


def test_other_versions_of_numba_count_references(monkeypatch) -> None:
    assert parts.borrowing_options(True) == {"_nrt": False} and parts.borrowing_options(False) == {"_nrt": True}
    monkeypatch.setattr(parts, "TRIED", ())
    assert parts.borrowing_options(True) == {}
