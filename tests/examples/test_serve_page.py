"""bench_serve's page of results: what its documents say, and nothing else of the page."""
from __future__ import annotations

import json
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from serve_bench import page  # noqa: E402

RESULTS = ROOT / "examples" / "results"
ABOUT = {"gpu": "NVIDIA H200", "torch": "2.11", "date": "2026-11-29T10:21:51+00:00", "command": "python a.py",
         "source_hash": "0123456789abcdef"}
MODEL = {"environment": ABOUT, "model": "llama-3.1-8b", "dtype": "float16"}
CELLS = {**MODEL, "products": "torch", "gb_per_s": 4400.0, "cells": [
    {"rows": 32, "context": 1024, "step_us": 5000.0, "limit_us": 4000.0, "over_limit": 1.25, "gap_us": 7.5,
     "gap_share": 0.0015}, {"rows": 1, "context": 1000, "step_us": 4000.0, "limit_us": 3500.0, "over_limit": 1.142857}]}
TRANSFORMERS = {**MODEL, "transformers_us": {"32x1024": 9000.0}, "transformers": "5.0"}
VLLM = {"environment": {"vllm": "0.24.0"}, "runs": [
    {"backend": backend, "shapes": [{"rows": 32, "median_ms": ms, "mean_context": 1200.0},
                                    {"rows": 32, "median_ms": 1.0, "mean_context": 8192.0}]}
    for backend, ms in (("CUSTOM", 2.0), ("FLASH_ATTN", 6.5), ("FLASHINFER", 7.0))]}
NANO = {"environment": ABOUT, "nano_vllm_commit": "abc", "nano_vllm": {
    "rows": 32, "new_tokens": 64, "tokens_per_s": 1234.4, "ours_tokens_per_s": 2000.0, "same_rows": 30, "near_ties": 2,
    "wrong": 0}}
PREDICTIONS = {**MODEL, "within": False, "predictions": [
    {"name": "azure", "requests": 300, "figures": {"tokens/s": [1000.0, 1040.0], "TTFT p50": [0.02, None]},
     "steps": [{"kind": "all", "steps": 4000, "mean": 0.05, "bias": -0.01, "p90": 0.1}]}]}
RUNS = {**MODEL, "runs": [{"name": "1024+256 x 8", "figures": {"TPOT p50": [0.005, 0.0051]}, "gap_share": 0.01}]}
SOAK = {"environment": ABOUT, "requests": 20000, "ended": {"served": 19000, "refused": 1000}, "tokens": 123456,
        "seconds": 61.0, "lost_pages": 0, "growth_bytes": [2**20, 0], "sound": True}


def written(tmp_path, *documents, text=None) -> str:
    files = []
    for number, document in enumerate(documents):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(document))
    out = tmp_path / "page.md"
    if text is not None:
        out.write_text(text)
    page.write(out, files)
    first = out.read_text()
    page.write(out, files)
    assert out.read_text() == first
    return first


def test_every_kind_of_document_is_told(tmp_path) -> None:
    said = written(tmp_path, CELLS, TRANSFORMERS, VLLM, NANO, PREDICTIONS, RUNS, SOAK)
    for words in (
        "| 32 x 1K | 5.000 | 4.000 | 1.250 | 7.5 | 0.15% | 6,400 |", "| 1 x 1,000 | 4.000 | 3.500 | 1.143 | - | - | 250 |",
        "| 32 x 1K | 5.000 | 9.000 | 6.500 | 1,200 |", "| 32 | 64 | 1,234 | 2,000 | 30 | 2 | 0 |", "nano-vllm abc",
        "| azure | tokens/s | 1,000 | 1,040 | +4.0% | 3% |", "| azure | TTFT p50, ms | 20.00 | - | - | 10% |",
        "| azure | steps, all: 4,000 |  | bias -1.0% | 5.0% | 8% |", "Not all are within their bounds.",
        "| 1024+256 x 8 | TPOT p50, ms | 5.00 | 5.10 | +2.0% |", "| 1024+256 x 8 | GPU idle in decode | 1.0% |  |  |",
        "| 20,000 | 19,000 | 1,000 | 0 | 0 | 1.0, 0.0 | 123,456 | 61 | yes |", "Transformers 5.0", "PyTorch's products",
        "`python a.py`, NVIDIA H200, PyTorch 2.11, kernel sources 01234567, 2026-11-29 10:21 UTC.",
    ):  # fmt: skip
        assert words in said, words
    assert "Not measured yet" not in said


def test_what_is_not_measured_is_named_and_other_words_stay(tmp_path) -> None:
    said = written(tmp_path, SOAK, text=f"# Head\n\n{page.BEGIN}\nold\n{page.END}\n\n## Why\n")
    assert said.startswith("# Head\n") and said.endswith(f"{page.END}\n\n## Why\n") and "old" not in said
    assert ("Not measured yet: decode steps against the memory's limit, other engines, predictions, traces and closed "
            "loops.") in said


def test_predictions_are_of_traces_and_closed_loops(tmp_path) -> None:
    said = written(tmp_path, PREDICTIONS, text=f"{page.BEGIN}\n{page.END}\n")
    assert "traces and closed loops" not in said and "a soak" in said


@pytest.mark.parametrize("text", ["{", "[]", '{"cats": 1}'])
def test_other_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "other.json").write_text(text)
    for path in (tmp_path / "other.json", tmp_path / "none.json"):
        with pytest.raises(ValueError, match="page: expected a JSON document of bench_serve, got"):
            page.write(tmp_path / "page.md", [path])
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="expected .* to have one line"):
        page.write(tmp_path / "page.md", [])


def test_the_page_that_is_kept_says_what_its_documents_say(tmp_path) -> None:
    kept = RESULTS / "h200_serve.md"
    out = tmp_path / kept.name
    out.write_text(kept.read_text())
    page.write(out, [*sorted(RESULTS.glob("h200_serve*.json")), RESULTS / "h200_vllm.json"])
    assert out.read_text() == kept.read_text()
