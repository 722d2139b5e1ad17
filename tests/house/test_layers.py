"""The rooms of the packages: who may import whom (the contracts of setup.cfg), and no crowded folder."""
import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

MOST_FILES_IN_A_FOLDER = 14


def test_every_import_follows_the_arrows():
    beside = Path(sys.executable).with_name("lint-imports")
    program = str(beside) if beside.exists() else shutil.which("lint-imports")
    if program is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("package", ["pkvsim", "gpu", "cuda_src"])
def test_no_folder_holds_too_many_files(package):
    folders = [ROOT / package, *(place for place in (ROOT / package).rglob("*") if place.is_dir())]
    crowded = {str(folder.relative_to(ROOT)): count for folder in folders
               if (count := len(list(folder.glob("*.py")))) > MOST_FILES_IN_A_FOLDER}
    assert not crowded


PACKAGES = [path for name in ("pkvsim", "gpu", "cuda_src") for path in sorted((ROOT / name).rglob("__init__.py"))]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_package_opens_with_a_reading_guide(package):
    """More than its first line, and the modules and rooms that it names in backticks are there."""
    guide = ast.get_docstring(ast.parse(package.read_text()))
    assert guide is not None and len(guide.splitlines()) > 2
    for name in re.findall(r"`([a-z]\w*)`", guide):
        place = package.parent / name
        assert place.with_suffix(".py").exists() or place.is_dir(), name
    # Everything beside it is named, alone or by what a group of modules begins with (`table_*`).
    beside = {path.stem for path in package.parent.glob("*.py")}
    beside |= {path.parent.name for path in package.parent.glob("*/__init__.py")}
    begins = tuple(re.findall(r"\b(\w+_)\*", guide))
    named = set(re.findall(r"\w+", guide))
    left_out = {name for name in beside - named if not name.startswith(("__", *begins))}
    assert not left_out


def test_the_guide_of_the_kernels_names_every_source():
    guide = (ROOT / "cuda_src" / "__init__.py").read_text()
    sources = {path.name for path in (ROOT / "cuda_src").iterdir() if path.suffix in (".cu", ".cuh")}
    assert {name for name in sources if not re.search(rf"\b{re.escape(name)}", guide)} == set()


def test_the_docs_map_has_every_room(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    rooms = importlib.import_module("hooks").ROOMS
    for package in ("pkvsim", "gpu", "cuda_src"):
        assert set(rooms[package]) == {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
