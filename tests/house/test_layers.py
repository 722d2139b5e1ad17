"""The rooms of the packages: who may import whom (the contracts of setup.cfg), and no crowded folder."""
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
