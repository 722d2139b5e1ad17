"""examples/bench_kv_types.py as far as no GPU is needed: its options, what it says without a GPU, its table."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import bench_kv_types  # noqa: E402


def test_a_machine_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_kv_types, "missing", lambda: "no CUDA device answers")
    assert bench_kv_types.main([]) == 1
    assert "bench_kv_types needs a CUDA GPU with CuPy and PyTorch" in capsys.readouterr().err


def test_kinds_of_caches() -> None:
    for text, name in (("16-bit", "16-bit"), ("int8", "int8/token"), ("float8_e5m2/page", "float8_e5m2/page")):
        assert bench_kv_types.name_of(bench_kv_types.kind_of(text)) == name


@pytest.mark.parametrize(("words", "said"), [
    ("--kinds int4", "kv_dtype: expected None or one of"), ("--kinds int8/head", "kv_scales: expected one of"),
    ("--cells 8", "expected positive ROWSxTOKENS"), ("--cells 0x5", "expected positive"),
    ("--variant 8xmany", "invalid literal"),
    ("--heads 32/5", "num_q_heads: expected a multiple")])
def test_bad_options_are_named(words, said, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_kv_types.parse_args(words.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_table() -> None:
    results = [bench_kv_types.Result("8x9", "16-bit", "8x2", 100.0, 400_000, 80.0),
               bench_kv_types.Result("8x9", "int8/token", "8x4", 54.0, 212_000, 43.2)]
    assert bench_kv_types.table(results).rows == (("8x9", "16-bit", "8x2", "100.0", "4", "1.25", "1.000"),
                                                  ("8x9", "int8/token", "8x4", "54.0", "4", "1.25", "0.540"))
