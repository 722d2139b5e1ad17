"""What the GPU record stands for: runs as the GPU itself and as the card, of these sources or of kernels whose code is what
it was then. A kernel that the runs did not have is named as unproven, with the reason."""
from __future__ import annotations

import json

import pytest
from paths import ROOT

from gpu.kernels.compile import source_hash
from tests.gpu import record

RECORD = ROOT / "tests" / "gpu" / "record.json"
RUN = {"source_hash": "1", "tests": 3, "failures": 0, "errors": 0, "skipped": 1, "passed": 2}
FILES = ["a.cu", "b.cu"]
GOOD = {"source_hash": "1", "runs": {"itself": RUN, "rtx3060": RUN}, "timings": [{}]}
BENCH = {
    "environment": dict.fromkeys(("gpu", "driver", "torch", "cuda", "cupy", "flashinfer", "command"), "x")
    | {"source_hash": "1"},
    "summary": {},
    "results": [dict.fromkeys(record.FIELDS, 1)],
}


def test_record_is_of_these_sources() -> None:
    found = record.wrong(json.loads(RECORD.read_text()), source_hash(), record.kernel_files())
    assert not found, (f"tests/gpu/record.json does not stand for these sources ({'; '.join(found)}): "
                       "run tests/gpu/run_all.sh on a GPU")


@pytest.mark.parametrize("path, value, said", [
    (("source_hash",), "2", "its runs are of other sources"), (("timings",), [], "no timings"),
    (("unproven",), {"a.cu": "why"}, "it names sources as unproven that its runs had"),
    (("runs", "rtx3060"), None, "no run of tests/gpu --card rtx3060"),
    (("runs", "itself"), None, "no run of tests/gpu as the GPU at hand"),
    (("runs",), None, "no run of tests/gpu as the GPU at hand"),
    (("runs", "rtx3060", "source_hash"), "2", "the run rtx3060 is of other sources"),
    (("runs", "itself", "failures"), 1, "the run itself did not pass"),
    (("runs", "rtx3060", "errors"), 1, "the run rtx3060 did not pass"),
    (("runs", "rtx3060", "passed"), 0, "the run rtx3060 did not pass"),
])
def test_what_is_missing_is_named(path, value, said) -> None:
    assert record.wrong(GOOD, "1", FILES) == []
    changed = json.loads(json.dumps(GOOD))  # a deep copy would share what the runs share
    at = changed
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    assert record.wrong(changed, "1", FILES)[0].startswith(said)


def test_a_record_of_other_sources_stands_for_proven_code_alone() -> None:
    old = GOOD | {"code": {"compiler": "x", "kernels": {"a.cu sm_90 WARPS=8": "1"}}}
    assert record.wrong(old, "2", ["a.cu"]) == []
    assert record.wrong(old, "2", FILES) == ["b.cu is neither of proven code nor named as unproven"]
    assert record.wrong(old | {"unproven": {"b.cu": "why"}}, "2", FILES) == []
    assert record.wrong(old | {"unproven": {"b.cu": "why"}}, "2", ["a.cu"]) == ["b.cu is named as unproven, and is not there"]


def junit(path, card: str | None, sources: str = "1"):
    told = "" if card is None else (f'<properties><property name="source_hash" value="{sources}"/>'
                                    f'<property name="card" value="{card}"/></properties>')
    suite = f'<testsuite tests="3" failures="0" errors="0" skipped="1">{told}</testsuite>'
    path.write_text(f"<testsuites>{suite}</testsuites>")
    return path


def test_a_record_is_put_together_of_both_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(record, "source_hash", lambda: "1")
    bench, out = tmp_path / "bench.json", tmp_path / "record.json"
    bench.write_text(json.dumps(BENCH))
    itself, card = junit(tmp_path / "itself.xml", ""), junit(tmp_path / "card.xml", "rtx3060")
    command = ["--bench", str(bench), "--out", str(out), "--junit", str(itself)]
    assert record.main(command) == 1 and not out.exists()
    assert "not written: no run of tests/gpu --card rtx3060" in capsys.readouterr().err
    assert record.main([*command, str(card)]) == 0
    written = json.loads(out.read_text())
    assert written["runs"] == GOOD["runs"] and record.wrong(written, "1", FILES) == []
    assert "2 tests passed as itself, 2 tests passed as rtx3060, 1 timings" in capsys.readouterr().out
    assert record.main([*command, str(junit(tmp_path / "bare.xml", None))]) == 1
    assert "expected the properties source_hash and card" in capsys.readouterr().err
