"""A cached loop notices that a file it calls into has changed."""
from __future__ import annotations

import importlib
import os
import sys

import pytest

CALLEE = "import numba\n\n\n@numba.njit(cache=True)\ndef price():\n    return {price}\n"
CALLER = """import numba

from {package}.callee import price
from pkvsim.numba_cache import drop_stale


@numba.njit(cache=True)
def total():
    return 2 * price()


{last}
"""


@pytest.mark.parametrize(("package", "last", "second"), [("kept", "", 2), ("dropped", 'drop_stale("dropped")', 10)])
def test_stale_callers_are_compiled_again(tmp_path, monkeypatch, package, last, second) -> None:
    """Without drop_stale Numba serves the old sum, which is what this guards against."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "caller.py").write_text(CALLER.format(package=package, last=last))
    totals = []
    for seconds, price in ((-100, 1), (100, 5)):
        source = folder / "callee.py"
        source.write_text(CALLEE.format(price=price))
        then = (folder / "caller.py").stat().st_mtime + seconds
        os.utime(source, (then, then))
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        importlib.invalidate_caches()
        totals.append(importlib.import_module(f"{package}.caller").total())
    assert totals == [2, second]
