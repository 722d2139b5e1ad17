"""examples/bench_append.py as far as no GPU is needed: its options, what it says without a GPU, its table."""
from __future__ import annotations

import re

import bench_append  # noqa: E402
import pytest
import without_gpu


def test_help_and_a_machine_without_a_gpu() -> None:
    assert "bench_append needs a CUDA GPU with CuPy and PyTorch" in without_gpu.run_main("bench_append").stderr


@pytest.mark.parametrize(("words", "said"), [
    ("--kv-dtypes float16,int4", "--kv-dtypes: expected of float16, float8_e4m3fn, float8_e5m2, int8, got int4"),
    ("--batches 8,many", "--batches, --heads: expected integers"), ("--heads 32/5", "num_q_heads: expected a multiple"),
    ("--batches 0", "expected positive numbers"),
])
def test_bad_options_are_named(words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_append.parse_args(words.split())
    assert stopped.value.code == 2 and re.search(re.escape(said), capsys.readouterr().err)


def test_table() -> None:
    results = [bench_append.Result("decode 8", 8, "float16", "append", 4.0, 1, 10**6, 20.0),
               bench_append.Result("decode 8", 8, "float16", "append + decode", 30.0, None, 10**6)]
    assert bench_append.table(results).rows == (
        ("decode 8", "8", "float16", "append", "1", "4.0", "250.0", "5.00"),
        ("decode 8", "8", "float16", "append + decode", "-", "30.0", "-", "-"))
