"""examples/bench_shared.py as far as no GPU is needed: how its rows share pages, and what its check compares."""
from __future__ import annotations

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import fake_gpu

torch = pytest.importorskip("torch")
from bench.shared_cells import SharedCell, costs_of, measured_of  # noqa: E402

from gpu.measure.pools import CellPages  # noqa: E402

CELL = SharedCell(6, 64, 40, groups=2, num_q_heads=4, num_kv_heads=2, head_dim=64)


@pytest.fixture
def measuring(monkeypatch):
    """bench.shared_measure without a GPU: every route is float64 attention on the CPU, and timing calls each layer."""
    with fake_gpu():
        sys.modules.pop("bench.shared_measure", None)
        module = importlib.import_module("bench.shared_measure")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(module.fi, "installed", lambda: False)
        monkeypatch.setattr(module, "graph_time_us", call_all)
        monkeypatch.setattr(module, "l2_bytes", lambda: 0)
        yield module
    sys.modules.pop("bench.shared_measure", None)


def call_all(run_one, *, variants, repeats):
    for index in range(variants):
        run_one(index)
    return SimpleNamespace(median_us=1.0)


def pages_of_two_layers() -> CellPages:
    own, prefix = -(-CELL.own // 16), CELL.prefix // 16
    ids = np.random.default_rng(0).permutation(CELL.groups * prefix + CELL.rows * own).astype(np.int32)
    shared = ids[: CELL.groups * prefix].reshape(CELL.groups, prefix)[CELL.group_of_row()]
    table = np.concatenate([shared, ids[CELL.groups * prefix :].reshape(CELL.rows, own)], axis=1)
    page = (len(ids), CELL.num_kv_heads, 16, CELL.head_dim)
    torch.manual_seed(0)
    return CellPages(table, tuple((torch.randn(page).half(), torch.randn(page).half()) for _ in range(2)))


def attention(q: torch.Tensor, table: np.ndarray, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
    length = CELL.prefix + CELL.own
    k, v = (
        pool[torch.from_numpy(table).long()].transpose(1, 2).flatten(2, 3)[:, :, :length].double()
        for pool in (k_pages, v_pages)
    )  # [rows, num_kv_heads, length, head_dim]
    query = q.double().unflatten(1, (CELL.num_kv_heads, -1))
    return (torch.softmax(query @ k.mT / CELL.head_dim**0.5, dim=-1) @ v).flatten(1, 2).half()


def bench(module, monkeypatch, *, told_errs_by: float = 0.0):
    """A SharedBench whose route "told" gives the last row but one so wrong."""
    pages = pages_of_two_layers()

    def route(self, name, cell, laid_out, q, weighed):
        assert (weighed is None) == (name in ("plain", "found"))

        def run(k_pages, v_pages, out):
            out[...] = attention(q, laid_out.block_table, k_pages, v_pages)
            if name == "told":
                out[-2] += told_errs_by

        return run

    monkeypatch.setattr(module.SharedBench, "route", route)
    monkeypatch.setattr(module.SharedBench, "lay_out", lambda self, cell, seed: pages)
    made = object.__new__(module.SharedBench)
    made.pool, made.repeats, made.cascade = SimpleNamespace(flat=torch.empty(0)), 1, False
    made.limit = SimpleNamespace(time_us=lambda num_bytes: 1.0)
    return made


def test_routes_are_compared_with_the_plain_step_of_the_same_layer(measuring, monkeypatch) -> None:
    """Timing goes over all layers, after which the plain route's checked output must still be the first one's."""
    result = bench(measuring, monkeypatch).measure(CELL)
    assert set(result.times) == {"plain", "told", "found"} and not result.notes
    assert max(result.errors.values()) < 1e-3


def test_steps_are_told_once_more_for_each_plan(measuring, monkeypatch) -> None:
    text = "least=8,merge=0"
    result = bench(measuring, monkeypatch).measure(CELL, only_ours=True, costs={text: costs_of(text)})
    assert set(result.times) == {"plain", "told", text}
    ours, other = result.costs["told"], result.costs[text]
    assert {**ours, "least": 8, "merge": 0} == other != ours
    assert result.best_other() == result.times["plain"]
    document = {"results": [{**dataclasses.asdict(CELL), **dataclasses.asdict(result)}]}
    assert [step.costs._asdict() for step in measured_of(document)] == [ours, other]


@pytest.mark.parametrize("text", ["", "tile", "tile=x", "tile=-1", "tile=1,tile=2", "tiles=3", "least=0", "tile=1e3"])
def test_costs_are_fields_with_whole_numbers_in_range(text) -> None:
    with pytest.raises(ValueError, match="costs"):
        costs_of(text)


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_rows_that_are_not_checked_against_float64_are_still_compared(measuring, monkeypatch, error) -> None:
    monkeypatch.setattr(measuring, "CHECKED_ROWS", 2)  # the first and the last
    with pytest.raises(SystemExit, match=f"told differs by {error:.0f}"):
        bench(measuring, monkeypatch, told_errs_by=error).measure(CELL)


@pytest.mark.parametrize("text, said", [
    ("[", "expected what bench_shared --json wrote"), ('{"x": 1}', "expected what bench_shared --json wrote"),
    ("[1]", "expected what bench_shared --json wrote"), ('{"results": [3]}', "expected what bench_shared --json wrote"),
    ('{"results": []}', "fit: expected steps that save enough")])
def test_a_file_that_nothing_can_be_fitted_to_is_named(tmp_path, capsys, text, said) -> None:
    import bench_shared

    path = tmp_path / "shared.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        bench_shared.main(["--fit", str(path)])
    error = capsys.readouterr().err
    assert error.startswith("bench_shared: error: ") and said in error and str(path) in error
