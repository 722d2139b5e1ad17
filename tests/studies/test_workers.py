"""Cells in this process, in others and on a Dask cluster: the same results in the same order, failures left alone."""
from __future__ import annotations

import threading
from functools import partial

import pytest
from serving_cases import DEVICE, MODEL, poisson_trace
from worker_cases import SEEN, seen, work

from pkvsim.studies.capacity.search import capacity_search
from pkvsim.studies.objectives import parse_objectives
from pkvsim.studies.sweep import serving_sweep
from pkvsim.studies.workers import Failed, Workers, run_cells

CELLS = range(1, 11)
EXPECTED = [1, 4, 9, 16, Failed("cell: expected no multiple of 5, got 5"), 36, Failed("KeyError: 'seven'"), 64, 81,
            Failed("cell: expected no multiple of 5, got 10")]  # fmt: skip


def test_here() -> None:
    told: list[tuple[int, int]] = []
    assert run_cells(work, CELLS, progress=lambda done, total: told.append((done, total))) == EXPECTED
    assert told == [(at, 10) for at in range(1, 11)]


def test_processes_and_one_that_dies() -> None:
    told: list[tuple[int, int]] = []
    results = run_cells(
        partial(work, end_at=9), CELLS, Workers(2), progress=lambda done, total: told.append((done, total))
    )
    assert isinstance(results[8], Failed) and "process that computed it ended" in results[8].reason
    assert results[:8] + results[9:] == EXPECTED[:8] + EXPECTED[9:]
    assert told == [(at, 10) for at in range(1, 11)]


def test_copies_of_this_process() -> None:
    assert run_cells(work, CELLS, Workers(2, forks=True)) == EXPECTED
    results = run_cells(partial(work, end_at=9), CELLS, Workers(2, forks=True))
    assert isinstance(results[8], Failed) and results[:8] + results[9:] == EXPECTED[:8] + EXPECTED[9:]


def test_no_copies_beside_other_threads() -> None:
    """A copy would have none of them, and whatever locks they held."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        SEEN.append(1)  # of which a process that imports the module anew knows nothing
        assert run_cells(seen, [0, 1], Workers(2, forks=True)) == [0, 0]
    finally:
        SEEN.clear()
        done.set()
        other.join()


def test_what_cannot_be_sent() -> None:
    results = run_cells(lambda cell: cell, [1, 2], Workers(2))
    assert all(isinstance(one, Failed) and "cannot be sent to another process: " in one.reason for one in results)


@pytest.mark.parametrize(("workers", "dask", "message"), [
    (0, None, "workers: expected an integer in [1, 256], got 0"), (257, None, "workers: expected"),
    (2, "tcp://a:1", "workers: a Dask cluster brings its own"),
])  # fmt: skip
def test_what_cannot_be(workers, dask, message) -> None:
    with pytest.raises(ValueError, match="workers: ") as refused:
        Workers(workers, dask)
    assert message in str(refused.value)


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two threads of this process."""
    distributed = pytest.importorskip("distributed", reason="no Dask: pip install '.[cluster]'")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp"
    ) as local:
        yield local.scheduler_address


def test_a_dask_cluster(cluster) -> None:
    told: list[tuple[int, int]] = []
    workers = Workers(dask=cluster)
    assert run_cells(work, CELLS, workers, progress=lambda done, total: told.append((done, total))) == EXPECTED
    assert told == [(at, 10) for at in range(1, 11)]


def test_a_sweep_on_a_dask_cluster_is_the_sweep_here(cluster) -> None:
    axes = {"device": ("h200", "l4"), "max_batch": (1, 8)}
    trace = poisson_trace(20, 4, 500, 10, seed=2)
    here = serving_sweep(axes, trace, MODEL, DEVICE, "balanced")
    there = serving_sweep(axes, trace, MODEL, DEVICE, "balanced", workers=Workers(dask=cluster))
    assert here.to_dict() == there.to_dict() and here.notes == there.notes


def test_a_capacity_search_on_a_dask_cluster_is_the_search_here(cluster) -> None:
    axes, trace = {"device": ("h200", "l4"), "tp": (1, 3)}, poisson_trace(20, 4, 500, 10, seed=2)
    here, there = (
        capacity_search(axes, trace, parse_objectives("ttft_p90=1s"), policy="balanced", tolerance=0.5, workers=workers)
        for workers in (Workers(), Workers(dask=cluster))
    )
    assert here.to_dict() == there.to_dict()


def test_a_cluster_out_of_reach(monkeypatch) -> None:
    pytest.importorskip("distributed", reason="no Dask: pip install '.[cluster]'")
    monkeypatch.setattr("pkvsim.studies.workers.CONNECT_S", 0.2)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(ValueError, match=f"dask: cannot reach {address}"):
            run_cells(work, CELLS, Workers(dask=address))
