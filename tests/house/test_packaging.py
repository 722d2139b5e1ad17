"""A wheel holds all that a user needs: the CUDA sources and the catalogue of GPUs included."""
import shutil
import subprocess
import sys
import zipfile

from paths import ROOT

PACKAGES = ("pkvsim", "gpu", "cuda_src")


def test_wheel_ships_every_source(tmp_path):
    source = tmp_path / "source"  # a copy, so that the build leaves nothing in the checkout
    skip = shutil.ignore_patterns("__pycache__")
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    suffixes = {".py", ".cu", ".cuh", ".json", ".html", ".css", ".js"}
    files = [p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.suffix in suffixes]
    missing = {str(p.relative_to(ROOT)) for p in files} - shipped
    assert not missing
    assert any(name.endswith(".cu") for name in shipped)


def test_pkvsim_needs_no_gpu_package():
    modules = "pkvsim.cli, pkvsim.studies.replay, pkvsim.reports.table_replay"
    code = f"import sys, {modules}; print({{'cupy', 'torch', 'gpu'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
