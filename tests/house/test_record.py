"""No kernel change lands unproven: the GPU record must be of these very sources."""
from __future__ import annotations

import json

from paths import ROOT

from gpu.kernels.compile import source_hash

RECORD = ROOT / "tests" / "gpu" / "record.json"


def test_record_is_of_these_sources() -> None:
    record = json.loads(RECORD.read_text())
    assert record["source_hash"] == source_hash(), (
        "cuda_src changed since the GPU tests last passed: run them on a GPU and rewrite tests/gpu/record.json "
        "(python -m tests.gpu.record)")
    assert record["tests"]["passed"] > 0 and not record["tests"]["failures"] and not record["tests"]["errors"]
    assert record["timings"]
