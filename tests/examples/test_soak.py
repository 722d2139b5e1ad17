"""examples/soak.py as far as no GPU is needed: its options, what it says without a GPU, and what it calls a failure."""
from __future__ import annotations

import platform
import re
from dataclasses import replace

import numpy as np
import pytest
import soak  # noqa: E402
import without_gpu

GOOD = soak.Mark(
    step=1, tokens=100, checksum=7, repeats=True, error=1e-4, gpu_bytes=1000, host_bytes=10**9,
    python_blocks=500, seconds=1.0,
)


def test_help_and_a_machine_without_a_gpu() -> None:
    done = without_gpu.run_main("soak")
    assert "--steps" in done.stdout and "soak needs a CUDA GPU with CuPy and PyTorch" in done.stderr


@pytest.mark.parametrize("name", ["steps", "check", "settle"])
def test_bad_options_are_named(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        soak.parse_args([f"--{name}", "0"])
    assert stopped.value.code == 2 and f"--{name}: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "said"), [
    ({"repeats": False}, "another result"), ({"error": 1.0}, "error 1.00e+00"), ({"error": float("nan")}, "error nan"),
    ({"gpu_bytes": 1001 + soak.SLACK_BYTES}, f"expected at most {1000 + soak.SLACK_BYTES:,}"),
    ({"host_bytes": 10**9 + soak.SLACK_BYTES + 1}, "host_bytes"),
])
def test_a_check_that_fails_is_told(change: dict, said: str) -> None:
    marks = [GOOD, replace(GOOD, step=2), replace(GOOD, step=3, **change)]
    (sentence,) = soak.failures(marks, settle=2)
    assert re.search(re.escape(said), sentence) and sentence.startswith("step 3")


def test_memory_may_grow_while_it_settles_and_within_the_slack() -> None:
    marks = [replace(GOOD, gpu_bytes=1), GOOD, replace(GOOD, host_bytes=10**9 + soak.SLACK_BYTES)]
    assert soak.failures(marks, settle=2) == []


def test_the_table_has_the_first_and_the_last_check() -> None:
    rows = soak.table([replace(GOOD, step=step) for step in range(1, 101)]).rows
    assert len(rows) == 12 and rows[0][0] == "1" and rows[-1][0] == "100"
    assert len(soak.table([GOOD]).rows) == 1


def test_what_a_step_costs_is_told_since_memory_settled() -> None:
    marks = [replace(GOOD, step=500), replace(GOOD, step=1000, host_bytes=10**9 + 7000),
             replace(GOOD, step=3000, host_bytes=10**9 + 1_007_000, python_blocks=1500)]
    told = soak.growth(marks, settle=2)
    assert "since step 1,000" in told and "500 bytes a step" in told and "0.500 pieces" in told
    assert "0 bytes a step" in soak.growth(marks[:1], settle=5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_arrays_of_a_check_leave_nothing_behind() -> None:
    """As a check's float64 copies do, of other lengths each time: glibc keeps up to 60 MiB of them in its heap."""
    def use(megabytes: int) -> None:
        arrays = [np.ones(megabytes << 17) for _ in range(2)]
        arrays.append(arrays[0] + arrays[1])

    use(30)
    seen = []
    for megabytes in (5, 31, 12, 28, 3, 20):
        use(megabytes)
        seen.append(soak.resident_bytes())
    assert max(seen) - min(seen) < soak.SLACK_BYTES // 8
