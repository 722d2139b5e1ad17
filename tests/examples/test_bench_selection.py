"""examples/bench_selection.py as far as no GPU is needed: its cells run on float64 kernels, checks and tables included."""
from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import fake_gpu

torch = pytest.importorskip("torch")




def test_lists_are_ascending_and_hold_the_last_page(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    with fake_gpu():
        sys.modules.pop("bench.selection_measure", None)
        measure = importlib.import_module("bench.selection_measure")
        counts = np.array([[3, 1], [5, 2]])
        lists = measure.SelectionBench._lists(np.random.default_rng(0), 2, 20, counts)
        assert (lists.counts.numpy() == counts).all()
        for index, count in np.ndenumerate(counts):
            places = lists.pages.numpy()[index][:count]
            assert (np.diff(places) > 0).all() and places[-1] == 19 and (lists.pages.numpy()[index][count:] == -1).all()
    sys.modules.pop("bench.selection_measure", None)


def test_the_tables_have_a_cell_for_every_time(capsys) -> None:
    import bench_selection
    from rich.console import Console

    times = dict.fromkeys(bench_selection.SHOWN[:-1], 2.0)
    result = SimpleNamespace(rows=8, length=32768, limit_us=1.0, times=times, host_us={"dense": 3.0},
                             over_dense=lambda name: times.get(name) and times[name] / times["dense"])
    for table in bench_selection.tables([result]):
        table.print(Console(width=200))
    shown = capsys.readouterr().out
    assert "8 x 32768" in shown and "1.000" in shown


@pytest.mark.parametrize("arguments", [["--fraction", "0"], ["--cells", "9"]])
def test_bad_arguments_are_named(arguments, capsys) -> None:
    import bench_selection

    with pytest.raises(SystemExit) as stopped:
        args = bench_selection.parse_args(arguments)
        bench_selection.chosen(args.cells, (1, 2))
    assert arguments[0] in str(stopped.value) + capsys.readouterr().err
