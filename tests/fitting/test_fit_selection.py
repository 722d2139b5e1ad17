"""Prices of selected pages fitted to measured steps."""
import json
import re

import numpy as np
import pytest
from paths import ROOT

from pkvsim.devices.device import get_device, load_device
from pkvsim.devices.selection_constants import SelectionConstants
from pkvsim.fitting.selection.cells import CODED_TIMES, TIMES, MeasuredSelection, read_selection_cells
from pkvsim.fitting.selection.fit_selection import STEPS, errors, fit, fit_selection, predicted

DEVICE = get_device("h200")
TRUE = SelectionConstants(7.0, 0.7, 0.5, 1.5e-3, 2.0, 0.95, 0.5, 2.0, 2e-3, 0.4, 20.0, 3.0)
GRID = [(1, 2048, 0.1), (1, 65536, 0.2), (2, 131072, 0.1), (8, 16384, 0.05), (32, 32768, 0.1), (128, 8192, 0.2),
        (64, 4096, 0.1)]  # fmt: skip


def made(rows, length, fraction) -> MeasuredSelection:
    bare = MeasuredSelection(rows, length, fraction, {}, 20.0)
    return MeasuredSelection(rows, length, fraction, predicted(bare, DEVICE, TRUE), 20.0)


def test_constants_come_back_from_the_steps_that_they_price() -> None:
    cells = [made(*cell) for cell in GRID]
    assert fit(cells, DEVICE) == pytest.approx(TRUE, rel=0.02, abs=2e-3)
    device, unseen = fit_selection(DEVICE, cells, source="made", date="2026-01-01")
    assert set(unseen) == {*TIMES, *CODED_TIMES} and max(np.abs(values).max() for values in unseen.values()) < 0.02
    assert device.selection.held_out.mean_percent < 1 and len(device.selection.cells) == len(GRID)


def test_the_shipped_constants_are_those_of_the_shipped_measurements() -> None:
    entry, results = DEVICE.selection, ROOT / "examples/results"
    files = [results / name for name in re.findall(r"\w+\.json", entry.source) if (results / name).exists()]
    found = [read_selection_cells(path) for path in files]
    cells = [cell for some, _ in found for cell in some]
    assert entry.source == "; ".join(source for _, source in found)
    assert entry.cells == tuple(cell.label for cell in cells)
    assert fit(cells, DEVICE) == pytest.approx(entry.constants, rel=0.01)
    off = np.concatenate([errors(cells, DEVICE, entry.constants, name) for name in STEPS])
    assert 100 * np.abs(off).mean() == pytest.approx(entry.in_sample.mean_percent, abs=0.1)


def test_the_shipped_constants_are_within_five_percent_of_a_run_that_no_fit_has_seen() -> None:
    cells, _ = read_selection_cells(ROOT / "examples/results/h200_selection_steps.json")
    off = np.concatenate([errors(cells, DEVICE, DEVICE.selection.constants, name) for name in STEPS])
    assert len(off) == 20 and np.abs(off).mean() < 0.05


def test_a_device_file_keeps_them(tmp_path) -> None:
    path = tmp_path / "one.json"
    path.write_text(DEVICE.to_json())
    assert load_device(path).selection == DEVICE.selection
    data = json.loads(path.read_text())
    del data["selection"]["constants"]["list_us"]  # as of a file that was fitted before waves had a price
    path.write_text(json.dumps(data))
    assert load_device(path).selection.constants == DEVICE.selection.constants._replace(list_us=0.0)
    for change, words in (({"status": "told"}, "selection.status"), ({"cells": 3}, "selection.cells"),
                          ({"constants": {}}, "selection.constants: missing"), ({"more": 1}, "selection: unknown"),
                          ({"constants": TRUE._asdict() | {"score_share": 0}}, "score_share: expected a number > 0"),
                          ({"constants": TRUE._asdict() | {"gap_us": "x"}}, "gap_us: expected a finite")):  # fmt: skip
        path.write_text(json.dumps(data | {"selection": data["selection"] | change}))
        with pytest.raises(ValueError, match=words):
            load_device(path)


@pytest.mark.parametrize(("text", "words"), [
    ("{", "cannot read"), ("[]", "results: expected"), ('{"results": []}', "results: expected"),
    ('{"results": [{"times": {}}]}', r"results\[0\].rows"),
    ('{"results": [{"rows": 1, "length": 9, "fraction": 0.1, "times": {"select": -1}}]}', "times.select: expected"),
    ('{"results": [{"rows": 1, "length": 9, "fraction": 2, "times": {}}]}', "fraction: expected"),
])  # fmt: skip
def test_files_that_are_none_are_named(tmp_path, text, words) -> None:
    path = tmp_path / "cells.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_selection_cells(path)
    with pytest.raises(ValueError, match="at least 4 cells"):
        fit_selection(DEVICE, [made(*GRID[0])], source="", date="")
