"""Whatever a test of kernels compiles is the code that the GPU record stands for, where it stands for that variant."""
from __future__ import annotations

import json
from pathlib import Path

import nvrtc
import pytest
from proven import RECORD, compiler, hashes, key

from gpu.kernels.compile import SOURCE_DIR


@pytest.fixture(autouse=True)
def code_is_as_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code is compared by the compiler that the record names alone: another makes other code of the same text."""
    code = json.loads(RECORD.read_text()).get("code", {"compiler": None, "kernels": {}})
    if code["compiler"] != compiler():
        return
    own = nvrtc.compiled

    def compiled(source: Path, capability: int, options: tuple[str, ...]) -> tuple[bytes, dict[str, nvrtc.Resources]]:
        cubin, resources = own(source, capability, options)
        wanted = code["kernels"].get(key(source.name, capability, options)) if source.parent == SOURCE_DIR else None
        assert wanted in (None, hashes(cubin, list(resources))), (
            f"{key(source.name, capability, options)} is not the code that tests/gpu/record.json stands for: "
            "run tests/gpu/run_all.sh on a GPU, then python -m tests.support.proven")
        return cubin, resources

    monkeypatch.setattr(nvrtc, "compiled", compiled)
