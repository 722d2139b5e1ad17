"""A wheel holds all that a user needs: the CUDA sources and the catalogue of GPUs included; extras are coherent."""
import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
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


def extras():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = dict(config["options.extras_require"])
    return {name: [Requirement(line) for line in value.split("\n") if line] for name, value in lines.items()}


@pytest.mark.parametrize("extra", ["gpu", "gpu-cuda13"])
def test_a_gpu_extra_is_what_was_checked(extra):
    """tests/house/extras.json is what `make check-extras` installed and compiled, each with the CUDA of its extra."""
    found = json.loads((ROOT / "tests" / "house" / "extras.json").read_text())[extra]
    for requirement in extras()[extra]:
        assert found["installed"][requirement.name] in requirement.specifier, requirement
        assert requirement.name[:5] != "cupy-" or requirement.extras == {"ctk"}
    assert found["nvrtc"].split(".")[0] == ("13" if "13" in extra else "12")
    assert set(found["modules_compiled"]) == {path.name for path in (ROOT / "cuda_src").glob("*.cu")}
    assert all(found["modules_compiled"].values())


def test_check_extras_compiles_every_source():
    import check_extras

    for capability in check_extras.CAPABILITIES:
        named = {name for name, _, _ in check_extras.variants(capability)}
        assert named == {path.name for path in (ROOT / "cuda_src").glob("*.cu")}


def test_check_extras_hides_the_toolkit(tmp_path):
    import check_extras

    (tmp_path / "nvcc").touch(mode=0o755)
    shown = {"PATH": os.pathsep.join(("/usr/bin", str(tmp_path))), "CUDA_PATH": "/opt", "HOME": "/home"}
    assert check_extras.without_toolkit(shown) == {"PATH": "/usr/bin", "HOME": "/home"}


@pytest.mark.parametrize(
    ("said", "extra"),
    [("CUDA Version: 12.8", "gpu"), ("CUDA Version: 13.0", "gpu-cuda13"), ("CUDA UMD Version: 13.1", "gpu-cuda13"),
     ("CUDA Version: N/A", "gpu")],
)  # fmt: skip
def test_make_takes_the_extra_of_the_driver(tmp_path, said, extra):
    if shutil.which("make") is None:
        pytest.skip("no make")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 580.1   Driver Version: 580.1   {said}   |'\n")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join((str(tmp_path), os.environ["PATH"]))}
    command = ["make", "-n", "-W", "setup.cfg", ".venv/.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"'.[{extra}]'" in done.stdout, done.stderr


def test_ci_runs_what_stands_on_pytorch_and_transformers():
    """Their tests skip without them, so that CI would be green with none of them run."""
    steps = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert 0 < steps.index("install -q torch ") < steps.index("'.[transformers]'") < steps.index("run: make test")
