"""A cached loop notices that a file it calls into has changed."""
from __future__ import annotations

import importlib
import os
import sys

PACKAGE = "package_with_stale_caches"
CALLEE = "import numba\n\n\n@numba.njit(cache=True)\ndef price():\n    return {price}\n"
CALLER = """import numba

from {package}.callee import price
from pkvsim.compiled import drop_stale


@numba.njit(cache=True)
def total():
    return 2 * price()


drop_stale("{package}")
"""


def test_stale_callers_are_compiled_again(tmp_path, monkeypatch) -> None:
    """Without drop_stale Numba (0.68) serves the old sum: 2, 2."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "caller.py").write_text(CALLER.format(package=PACKAGE))
    totals = []
    for seconds, price in ((-100, 1), (100, 5)):
        source = folder / "callee.py"
        source.write_text(CALLEE.format(price=price))
        then = (folder / "caller.py").stat().st_mtime + seconds
        os.utime(source, (then, then))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        importlib.invalidate_caches()
        totals.append(importlib.import_module(f"{PACKAGE}.caller").total())
    assert totals == [2, 10]
