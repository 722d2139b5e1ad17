"""What the benchmark scripts do alike: exit codes, what they print, and the JSON document."""
from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import without_gpu
from bench import script

from gpu.measure import memory
from pkvsim import DecodeShape

ABOUT = {"gpu": "a GPU", "source_hash": "1"}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "lacks_gpu", lambda program: False)
    monkeypatch.setattr(script, "environment", lambda: ABOUT)
    monkeypatch.setattr(memory, "free_bytes", lambda: 6 << 30)
    monkeypatch.setattr(memory, "peak_bytes", lambda: 5)
    monkeypatch.setattr(memory, "peak_line", lambda: "peak")


@pytest.mark.parametrize("name", ["bench_decode", "bench_selection", "bench_shared", "bench_serve", "bench_products"])
def test_without_a_gpu(name) -> None:
    assert f"{name} needs a CUDA GPU" in without_gpu.run_main(f"examples.{name}").stderr


def test_the_document_has_what_was_measured_beside_what_it_was_measured_on(a_gpu, tmp_path, capsys) -> None:
    shape = DecodeShape(8, 2, 128, 16)
    args, pools = SimpleNamespace(pool_gib=None, json=tmp_path / "out.json", cells=("all",), shape=shape), []

    def measure(args: SimpleNamespace, pool_gib: float, console) -> dict:
        pools.append(pool_gib)
        script.print_notes(console, "not timed", ("[one]",))
        return {"results": [1], "left_out": 0}

    assert script.run_script("bench_any", args, script.in_pool(args, measure, pool_gib=16), width=80) == 0
    shown, document = capsys.readouterr().out, json.loads(args.json.read_text())
    assert pools == [4.0] and "pool 4 GiB in place of 16" in shown and "not timed: [one]" in shown
    assert document == {
        "environment": ABOUT, "options": {"pool_gib": None, "json": str(args.json), "cells": ["all"], "shape": str(shape)},
        "pool": {"wanted_gib": 16, "granted_gib": 4.0, "free_gib": 6.0}, "peak_gpu_bytes": 5, "results": [1],
        "left_out": 0,
    }  # fmt: skip


def test_a_pool_that_does_not_fit_is_named_before_anything_is_measured(a_gpu, capsys) -> None:
    args = SimpleNamespace(pool_gib=7.0, json=None)
    measured = script.in_pool(args, lambda *given: sys.exit("measured"), pool_gib=16)
    with pytest.raises(SystemExit) as stopped:
        script.run_script("bench_any", args, measured, width=80)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("bench_any: error: pool-gib: expected at most 6")


class OutOfMemoryError(RuntimeError):
    """As PyTorch's; CuPy's of that name is a MemoryError."""


@pytest.mark.parametrize(("error", "said"), [
    (ValueError("model: expected\n  one"), "model: expected one"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 246.00 MiB. GPU 0 has a total capacity of 139.80 GiB. See."),
     "CUDA out of memory. Tried to allocate 246.00 MiB"),
    (MemoryError(), "not enough memory"),
    (FileNotFoundError(2, "No such file or directory", "/x.gguf"), "[Errno 2] No such file or directory: '/x.gguf'"),
])
def test_what_cannot_be_is_one_line(error, said, capsys) -> None:
    @script.one_line_errors("any")
    def main() -> int:
        raise error

    for _ in range(2):  # a decorated main may be called again
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2 and capsys.readouterr().err == f"any: error: {said}\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="illegal"), script.one_line_errors("any"):
        raise RuntimeError("an illegal memory access")


def test_room_beside_a_pool(a_gpu) -> None:
    memory.expect_room(6 << 30, "page summaries")
    with pytest.raises(memory.NoRoom, match="pool-gib: expected a pool beside which 7 GiB of page summaries have room"):
        memory.expect_room(7 << 30, "page summaries")


def test_cells_by_number() -> None:
    assert script.chosen("bench_any", "all", (5, 6, 7)) == [5, 6, 7]
    assert script.chosen("bench_any", "2,0", (5, 6, 7)) == [7, 5]
    with pytest.raises(SystemExit, match="bench_any: --cells: expected numbers from 0 to 2 or all, got '3'"):
        script.chosen("bench_any", "3", (5, 6, 7))
    assert script.chosen("bench_any", "1,long", (5, 6, 7), long=9) == [6, 9]
    with pytest.raises(SystemExit, match="expected numbers from 0 to 2, long or all, got 'short'"):
        script.chosen("bench_any", "short", (5, 6, 7), long=9)


def test_what_is_unsound_ends_with_1_and_is_written(a_gpu, tmp_path) -> None:
    args = SimpleNamespace(json=tmp_path / "out.json")
    assert script.run_script("bench_any", args, lambda console: {"sound": False}, width=80) == 1
    assert json.loads(args.json.read_text())["sound"] is False


def test_of_several_processes_one_prints_and_writes(a_gpu, tmp_path, capsys) -> None:
    args = SimpleNamespace(json=tmp_path / "out.json")
    measured = lambda console: console.print("measured") or {}  # noqa: E731
    assert script.run_script("bench_any", args, measured, width=80, leads=False) == 0
    assert capsys.readouterr().out == "" and not args.json.exists()


def test_without_a_gpu_what_needs_none_goes_on(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "missing", lambda: "no CUDA device answers")
    args = SimpleNamespace(json=tmp_path / "out.json")
    assert script.run_script("bench_any", args, lambda console: {"results": 1}, width=80, needs_gpu=False) == 0
    assert json.loads(args.json.read_text()) == {"environment": {}, "options": {"json": str(args.json)}, "results": 1}
