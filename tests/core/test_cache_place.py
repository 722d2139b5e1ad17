"""pkvsim runs where neither the install nor a home can be written, and says once where it keeps machine code."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

from pkvsim.compiled import cache_place


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """A copy of pkvsim in which nobody, root included, can make a cache: a file stands in its place."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "pkvsim", site / "pkvsim", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (site / "pkvsim", *(path for path in (site / "pkvsim").rglob("*") if path.is_dir())):
        (folder / "__pycache__").touch()
    return site


def run(install, temporary, *args):
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    kept |= {"HOME": "/dev/null", "TMPDIR": str(temporary), "PYTHONPATH": str(install), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *args], cwd=install, env=kept, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [["-c", "import pkvsim"], ["-m", "pkvsim", "devices"], ["-m", "pkvsim", "replay", "--policy", "paper"]]
)
def test_a_temporary_folder_keeps_the_cache(install, tmp_path, args):
    for _ in range(2):
        done = run(install, tmp_path, *args)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "are kept in" in line]
        assert len(said) == 1 and f"{tmp_path}/pkvsim-numba-{os.getuid()}, since" in said[0]
    assert (tmp_path / f"pkvsim-numba-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    assert "replay" not in args or list(tmp_path.rglob("*.nbc"))


def test_a_folder_that_others_could_write_is_not_taken(install, tmp_path):
    """Numba unpickles what it finds there."""
    open_folder = tmp_path / f"pkvsim-numba-{os.getuid()}"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    done = run(install, tmp_path, "-c", "import pkvsim")
    assert done.returncode == 0 and f"{tmp_path}/pkvsim-numba-" in done.stderr
    assert f"{open_folder}, since" not in done.stderr
    assert list(tmp_path.iterdir()) == [open_folder] and not list(open_folder.iterdir())


def test_without_any_folder_nothing_is_cached(monkeypatch, capsys):
    monkeypatch.setattr(cache_place, "_numba_has_a_place", lambda: False)
    monkeypatch.setattr(cache_place, "_temporary_folder", lambda: None)
    assert cache_place.find_cache() is False
    assert capsys.readouterr().err.count("\n") == 1
