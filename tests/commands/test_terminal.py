"""What every command prints fits a terminal of 80 columns: nothing cut, no line that runs over."""
from __future__ import annotations

import contextlib
import re
import sys

import numpy as np
import pytest
from command import azure_trace
from paths import ROOT
from rich.cells import cell_len

from pkvsim import cli
from pkvsim.commands import serving_inputs
from pkvsim.devices.device import DEVICES
from pkvsim.fitting.selection.cells import TIMES, read_selection_cells
from pkvsim.reports.selection.table_fit import print_selection_fit
from pkvsim.reports.table_replay import print_fit

CONFIGS = ROOT / "tests" / "models" / "configs"
COMMANDS = (
    "devices",
    *(f"models {CONFIGS / name}.json" for name in ("Qwen--Qwen3-235B-A22B", "nvidia--Nemotron-H-56B-Base-8K",
                                                   "Qwen--Qwen3-VL-32B-Thinking")),  # fmt: skip
    "devices h200 rtx3060 b200",
    "replay --steps 8",
    "replay --steps 8 --policy paper --device h200",
    "step --seq-lens 65536,2048x15",
    "step --seq-lens 15200x32 --window 4096 --layers 32 --device h200",
    "step --seq-lens 1048576x256 --device b200 --layers 126",
    "sweep --over batch=1,8,64 --over length=1024,8192,65536,131072,1048576 --device h200",
    "sweep --over policy=calibrated,paper,oracle,flashinfer_tensor_core,flashinfer_cuda_core --over batch=1,64",
    "sweep --over batch=1,64 --over policy=calibrated,paper,oracle,flashinfer_tensor_core,flashinfer_cuda_core",
    "sweep --over batch=1 --over length=8192 --over splits=1,4 --policy split",
    "sweep --trace TRACE --over policy=calibrated,flashinfer_tensor_core --over device=rtx3060,h100_sxm",
    "step --seq-lens 8704x48,1000x4 --shared 8192x48 --device h200",
    "step --seq-lens 131072 --device h200 --kv-parallel 2",
    "step --seq-lens 131072,8000x4 --select mean_std:0.1 --device h200",
    "sweep --over length=8192,65536 --over select=off,mean_std:0.1 --device l4",
    "whatif --trace TRACE --device h200 --policies balanced,calibrated --select mean_std:0.1",
    "trace TRACE",
    "whatif --trace TRACE --device h200 --engine vllm --policies engine,balanced",
    "whatif --trace TRACE --device h200 --kv-parallel 2",
    "whatif --trace TRACE --device h200 --replicas 2 --kv-gib 2 --lend all",
    "whatif --trace TRACE --device h200 --prefill-replicas 1 --engine vllm",
    "whatif --trace TRACE",
    "whatif --trace TRACE --device h200 --policies "
    "paper,calibrated,flashinfer,flashinfer_cuda_core,flashinfer_tensor_core,workqueue,balanced,split,oracle",
)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def check(shown: str) -> None:
    lines = ESCAPES.sub("", shown).splitlines()
    assert lines and not [line for line in lines if "…" in line]
    assert not [line for line in lines if cell_len(line) > 80]


@pytest.fixture
def terminal(monkeypatch):
    """stdout as rich sees a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(serving_inputs, "progress_bar", lambda show, unit, **_: contextlib.nullcontext())
    monkeypatch.setenv("TERMINAL_WIDTH", "80")  # typer's, for help


@pytest.mark.parametrize("command", COMMANDS)
def test_tables(tmp_path, monkeypatch, capsys, terminal, command):
    trace = tmp_path / "a_long_name_of_a_trace_from_a_service_in_production.csv"
    trace.write_text(azure_trace(20))
    args = [str(trace) if part == "TRACE" else part for part in command.split()]
    monkeypatch.setattr(sys, "argv", ["pkvsim", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    check(capsys.readouterr().out)


def test_a_fit(capsys, terminal):
    device = DEVICES["h200"]
    fitted = {name for name, route in device.calibration.items() if route.in_sample}
    assert fitted
    print_fit(device, fitted, {"xqa": 3})
    cells, _ = read_selection_cells(ROOT / "examples/results/h200_selection.json")
    print_selection_fit(device, cells, dict.fromkeys(TIMES, np.full(len(cells), -0.123)))
    check(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["", *(command.__name__ for command in cli.COMMANDS)])
def test_help_has_examples(monkeypatch, capsys, terminal, command):
    monkeypatch.setattr(sys, "argv", ["pkvsim", *command.split(), "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"Examples:\n    pkvsim {command}" in shown or f"Examples:\n  pkvsim {command}" in shown
    check(shown)
