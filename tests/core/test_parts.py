"""Inner functions compiled as parts give what Numba's own way gives, cold and from the cache."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

from pkvsim.compiled import parts

PROGRAM = """
import numpy as np
from pkvsim.compiled import inner, inner_allocating, outer

@inner
def share(lens, at):
    return lens[at] / lens.sum()

@inner_allocating
def largest(lens):
    best = 0.0
    for at in range(len(lens)):
        best = max(best, share(lens, at))
    return best, lens[::-1].copy()

@outer
def both(lens):
    best, ordered = largest(lens)
    return best + share(lens, 0), ordered

@outer
def other(lens):
    return largest(lens)[0]

lens = np.array([1.5, 2.5, 4.0])
print(both(lens)[0], both(lens)[1].tolist(), other(lens), sum(both.stats.cache_hits.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_parts_compute_the_same(tmp_path, plain):
    (tmp_path / "program.py").write_text(PROGRAM)
    package = tmp_path / "pkvsim" / "compiled"
    package.parent.mkdir()
    shutil.copytree(ROOT / "pkvsim" / "compiled", package, ignore=shutil.ignore_patterns("__pycache__"))
    if plain:
        code = (package / "parts.py").read_text()
        (package / "parts.py").write_text(re.sub("TRIED = .*", "TRIED = ()", code))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    shown = [
        subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [done.stderr for done in shown] == ["", ""]
    assert [done.stdout for done in shown] == [f"0.6875 [4.0, 2.5, 1.5] 0.5 {hits}\n" for hits in (0, 1)]


def test_other_versions_of_numba_compile_in_their_own_way(monkeypatch):
    monkeypatch.setattr(parts, "TRIED", ())
    assert parts.part_options() == {}
