"""The documentation's tables are those of the code: JSON keys, device files, options, the feature table's tests."""
from __future__ import annotations

import configparser
import ctypes
import importlib
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import MISSING, fields

import numpy as np
import pytest
from command import azure_trace, pkvsim
from cpp import build
from paths import ROOT
from trace_writers import mooncake

from pkvsim import DecodeShape, reference
from pkvsim.devices.device import NUMBER_FIELDS, OPTIONAL_FIELDS
from pkvsim.devices.outside_constants import OutsideConstants, OutsideEntry
from pkvsim.devices.route_model import NO_LIMIT, RULES, CalibratedRoute, FitError, RouteModel
from pkvsim.devices.selection_constants import SelectionConstants, SelectionEntry
from pkvsim.schedule.costs import BalancedCosts

DOCS = ROOT / "docs"


def rows(page: str, section: str) -> list[list[str]]:
    """The cells of the first table below a heading, its head and rule left out."""
    text = (DOCS / page).read_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def first_cells(page: str, section: str) -> set[str]:
    return {cell for row in rows(page, section) for cell in re.findall(r"`([^`]+)`", row[0])}


def paths(value: object, names: dict[str, str], where: str = "") -> set[str]:
    """Every key of a JSON document as a dotted path. [] stands for any element of an array of objects; a key that is a
    name, such as a route's, for what `names` says of the objects below that path."""
    if isinstance(value, dict):
        placeholder = names.get(where)
        found = set()
        for key, inner in value.items():
            at = f"{where}.{placeholder or key}" if where else placeholder or key
            found |= paths(inner, names, at)
        return found or {where}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(inner, names, f"{where}[]") for inner in value))
    return {where}


NAMES = {  # where keys are names, and what the page calls them
    "routes": "ROUTE", "policies": "POLICY", "engines": "ENGINE", "engines.ENGINE.routes": "ROUTE",
    "policies.POLICY.routes": "ROUTE", "policies.POLICY.tiers.devices": "TIER", "cells[].result.routes_us": "ROUTE", "cells[].result.routes": "ROUTE",
    "[].routes": "ROUTE", "[].numbers": "NUMBER", "[].routes.ROUTE.model": "CONSTANT", "axes": "SETTING",
    "[].bits_per_weight": "CLASS", "[].ignored": "FIELD", "[].outside": "ENGINE", "[].outside.ENGINE.basis": "CONSTANT",
    "[].outside.ENGINE.constants": "CONSTANT", "[].selection.constants": "CONSTANT",
    "objectives": "OBJECTIVE", "cells[].result.objectives": "OBJECTIVE", "cells[].points[].values_s": "OBJECTIVE",
    "cells[].result.tiers.devices": "TIER",
    "prices": "DEVICE", "cells[].result.summary.routes": "ROUTE",
}
RUNS = {
    "step": ("--seq-lens 4096,17 --device rtx3060", "--seq-lens 0 --device h200",
             "--seq-lens 4096x8 --shared 2048x4 --device h200",
             "--seq-lens 32768x8 --select mean_std:0.1 --device h200"),
    "replay": ("--requests 4 --steps 2 --device rtx3060", "--requests 4 --steps 2 --device rtx3060 --policy paper"),
    "whatif": ("--trace mooncake.jsonl --device h200 --policies calibrated,paper --prefix-cache lru",
               "--trace azure.csv --device l4 --select mean_std:0.1",
               "--trace mooncake.jsonl --device h200 --policies balanced --tier host:1GiB:50"),
    "sweep": ("--over batch=1,2 --over length=1024 --device l4", "--over rate=1,2 --trace azure.csv --device l4",
              "--over rate=1 --trace mooncake.jsonl --device l4 --tier host:1GiB:50"),
    "capacity": ("--trace azure.csv --slo ttft_p90=1s --price l4=0.8 --over device=l4 --over tp=1 --over batch=8 "
                 "--over policy=balanced --over model=llama-3.1-8b --over page_size=16 --over prefix_cache=none "
                 "--over weight_bits=16 --over step_tokens=256",
                 "--trace azure.csv --slo ttft_p90=1us --over device=l4"),
    "trace": ("mooncake.jsonl", "azure.csv"),
    "models": ("", ),
    "devices": ("h200 l4",),
}


def documented(command: str) -> set[str]:
    """Keys of the command's table; a sweep of a trace and a search have those of one policy of whatif."""
    keys = first_cells("reference/json.md", f"pkvsim {command}")
    place = {"sweep": "cells[].result", "capacity": "cells[].result.summary"}.get(command)
    if place is not None:
        served = {key for key in documented("whatif") if key.startswith("policies.POLICY.")}
        left_out = (".timeline",) if command == "sweep" else (".timeline", ".tiers")
        keys |= {key.replace("policies.POLICY", place) for key in served if not any(part in key for part in left_out)}
    return keys


@pytest.mark.parametrize("command", RUNS)
def test_every_json_key_is_documented_and_every_documented_key_is_printed(
    command, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "azure.csv").write_text(azure_trace(6))
    (tmp_path / "mooncake.jsonl").write_text(mooncake([(0, 1500, 20), (900, 1200, 12), (2000, 300, 30)]))
    printed = set()
    for options in RUNS[command]:
        code, out, err = pkvsim(capsys, monkeypatch, command, *options.split(), "--json")
        assert code == 0, err
        printed |= paths(json.loads(out), NAMES)
    known = documented(command)
    # An object that may be null or empty has a line of its own.
    assert printed - known == set()
    assert {key for key in known - printed if not any(at.startswith(f"{key}.") for at in printed)} == set()


def test_the_device_file_s_numbers_are_those_of_a_spec() -> None:
    assert first_cells("reference/device_file.md", "Numbers") == {*NUMBER_FIELDS, *OPTIONAL_FIELDS}


def test_the_device_file_s_outside_is_that_of_an_entry_with_its_defaults() -> None:
    assert first_cells("reference/device_file.md", "Outside") == {field.name for field in fields(OutsideEntry)}
    table = {re.search(r"`(\w+)`", row[0]).group(1): row for row in rows("reference/device_file.md", "Constants outside")}
    assert list(table) == [field.name for field in fields(OutsideConstants)]
    for field in fields(OutsideConstants):
        _, unit, default, _ = table[field.name]
        assert unit and (default == "") == (field.default is MISSING), field.name
        assert field.default is MISSING or float(default) == field.default, field.name


def test_the_device_file_s_selection_is_that_of_an_entry() -> None:
    assert first_cells("reference/device_file.md", "Selection") == {field.name for field in fields(SelectionEntry)}
    table = first_cells("reference/device_file.md", "Constants of selection")
    assert table == set(SelectionConstants._fields)


def test_the_device_file_s_routes_are_those_of_a_calibrated_route() -> None:
    text = (DOCS / "reference/device_file.md").read_text().split("\n## Routes\n")[1].split("\n## ")[0]
    named = {cell for line in text.splitlines() if line.startswith("| `")
             for cell in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert named == {field.name for kind in (CalibratedRoute, FitError) for field in fields(kind)}


def test_the_device_file_s_constants_are_those_of_a_route_model_with_their_defaults() -> None:
    table = {re.search(r"`(\w+)`", row[0]).group(1): row for row in rows("reference/device_file.md", "Constants")}
    assert list(table) == [field.name for field in fields(RouteModel)]
    for field in fields(RouteModel):
        _, unit, default, _ = table[field.name]
        assert unit, field.name
        if field.default is MISSING:
            assert default == "", field.name
        elif field.name == "costs":
            assert default == "measured" and all(f"`{name}`" in table["costs"][3] for name in BalancedCosts._fields)
        else:
            assert (float("inf") if default == NO_LIMIT else float(default)) == field.default, field.name
    assert set(re.findall(r"`(\w+)`", table["rule"][3])) == set(RULES)


def test_every_extra_has_a_row() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    table = (DOCS / "extras.md").read_text()
    assert [name for name in config["options.extras_require"] if f"\n| `{name}` |" not in table] == []


def test_the_guide_s_schedule_runs() -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "schedule.md").read_text(), re.DOTALL).group(1)
    exec(code, names := {})
    assert len(names["schedule"].cta_offsets) == 29


ONE_CTA_AT_A_TIME = """
#include <cmath>
#include <pthread.h>
#include <thread>
#include <vector>
#define __global__ static
#define __shared__
struct Index { int x, y; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim;
static pthread_barrier_t barrier;
static void __syncthreads() { pthread_barrier_wait(&barrier); }
float products[64];
%s
extern "C" void run(const float* q, const float* k, const float* v, const int* table, const int* lens, float* out,
                    int rows, int heads, int head_dim, int page_size, int max_pages, float scale) {
  blockDim.x = head_dim;
  pthread_barrier_init(&barrier, nullptr, head_dim);
  for (blockIdx.x = 0; blockIdx.x < rows; ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < heads; ++blockIdx.y) {
      std::vector<std::thread> threads;
      for (int i = 0; i < head_dim; ++i)
        threads.emplace_back([=] {
          threadIdx.x = i;
          simple_decode(q, k, v, table, lens, out, heads, page_size, max_pages, scale);
        });
      for (std::thread& thread : threads) thread.join();
    }
}
"""


def test_the_guide_s_simple_kernel_is_right(tmp_path) -> None:
    """Run on the CPU, a thread for each of CUDA's and a barrier for __syncthreads, against the float64 reference."""
    kernel = re.search(r"```cuda\n(.*?)```", (DOCS / "schedule.md").read_text(), re.DOTALL).group(1)
    source = tmp_path / "simple.cpp"
    source.write_text(ONE_CTA_AT_A_TIME % kernel)
    library = build(source, tmp_path / "simple.so", "-std=c++17", "-O1", "-pthread")
    shape = DecodeShape(num_q_heads=2, num_kv_heads=2, head_dim=16, page_size=4)
    rng, lens = np.random.default_rng(0), np.array([9, 0, 5], np.int32)
    q = rng.standard_normal((3, 2, 16), np.float32)
    k, v = rng.standard_normal((2, 9, 2, 4, 16), np.float32)
    table, out = rng.permutation(9).astype(np.int32).reshape(3, 3), np.full((3, 2, 16), np.nan, np.float32)
    arrays = [array.ctypes.data_as(ctypes.c_void_p) for array in (q, k, v, table, lens, out)]
    library.run(*arrays, 3, 2, 16, 4, 3, ctypes.c_float(0.25))
    expected, _ = reference.attention(shape, q, k, v, table, lens)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_command_reference_has_every_option(monkeypatch) -> None:
    pytest.importorskip("mkdocs")
    import typer

    from pkvsim.cli import app

    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("hooks").commands_page()
    for name, command in typer.main.get_command(app).commands.items():
        section = page.split(f"## `pkvsim {name}`\n", 1)[1].split("\n## ", 1)[0]
        for param in command.params:
            assert param.param_type_name == "argument" or all(f"`{option}`" in section for option in param.opts)


def test_the_drawings_are_svg(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    drawings = importlib.import_module("drawings")
    for drawing in (drawings.spans(), drawings.schedules(), drawings.launch()):
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
