"""Cells of a study, one after another here, in processes of this machine, or on a Dask cluster.

Each cell is a call of one function and stands for itself: an exception in it, or the end of the process that runs it,
leaves that cell with a reason and all others with their results. Results come in the order of the cells, whoever
computed them.
"""
from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pkvsim.shapes import check_int

MAX_WORKERS = 256
CONNECT_S = 10  # A Dask scheduler that has not answered by then counts as out of reach.
Cell = TypeVar("Cell")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # cells done, of how many


@dataclass(frozen=True, slots=True)
class Failed:
    """A cell that has no result."""

    reason: str


@dataclass(frozen=True, slots=True)
class Workers:
    """Who computes cells: this process (processes=1), others of this machine, or a Dask cluster at an address such as
    `tcp://10.0.0.1:8786`, on which pkvsim must be installed. ValueError naming the field.

    forks: whether the processes may be copies of this one where that is safe, with all that it has imported; spawned
    ones import it again, a second of each. For a caller that runs no threads but Python's main one.
    """

    processes: int = 1
    dask: str | None = None
    forks: bool = False

    def __post_init__(self) -> None:
        check_int("workers", self.processes, 1, MAX_WORKERS)
        if self.dask is not None and self.processes != 1:
            raise ValueError(f"workers: a Dask cluster brings its own, got {self.processes} beside dask {self.dask}")


def run_cells(
    function: Callable[[Cell], Result],
    cells: Sequence[Cell],
    workers: Workers = Workers(),
    *,
    progress: Progress | None = None,
) -> list[Result | Failed]:
    """function(cell) of every cell, in their order.

    With several workers the function and the cells are pickled, and processes are spawned (but see Workers.forks): a
    script that calls this must be guarded by `if __name__ == "__main__"`. ValueError where a Dask cluster cannot be
    reached.
    """
    results: dict[int, Result | Failed] = {}
    for index, result in each_result(function, cells, workers):
        results[index] = result
        if progress is not None:
            progress(len(results), len(cells))
    return [results[index] for index in range(len(cells))]


def each_result(
    function: Callable[[Cell], Result], cells: Sequence[Cell], workers: Workers = Workers()
) -> Iterator[tuple[int, Result | Failed]]:
    """(index of a cell, its result) as they come; what is not fetched any more is not computed."""
    if workers.dask is not None:
        yield from _on_dask(function, cells, workers.dask)
    elif workers.processes == 1 or len(cells) < 2:
        for index, cell in enumerate(cells):
            yield index, _guarded(function, cell)
    else:
        yield from _in_processes(function, cells, min(workers.processes, len(cells)), forks=workers.forks)


@dataclass(frozen=True, slots=True)
class _Guarded(Generic[Cell, Result]):
    """The function with its exceptions as results, for another process."""

    function: Callable[[Cell], Result]

    def __call__(self, cell: Cell) -> Result | Failed:
        return _guarded(self.function, cell)


def _guarded(function: Callable[[Cell], Result], cell: Cell) -> Result | Failed:
    try:
        return function(cell)
    except Exception as error:
        return Failed(_reason(error))


def _reason(error: BaseException) -> str:
    """A ValueError says what is wrong by itself; of others the kind tells as much as the message."""
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}".removesuffix(": ")


def _in_processes(
    function: Callable[[Cell], Result], cells: Sequence[Cell], processes: int, *, forks: bool
) -> Iterator[tuple[int, Result | Failed]]:
    unfinished = set(range(len(cells)))
    for index, result in _pool(function, cells, unfinished, processes, forks=forks):
        unfinished.discard(index)
        yield index, result
    # A process that dies takes its pool along. Which cell it died of shows when each has a process of its own.
    for index in sorted(unfinished):
        yield from _pool(function, cells, [index], 1)


def _pool(
    function: Callable[[Cell], Result], cells: Sequence[Cell], indices: Iterable[int], processes: int, *,
    forks: bool = False,
) -> Iterator[tuple[int, Result | Failed]]:
    """Results as they come; with one index the death of its process is one, with more those left are not named."""
    # A copy of a process with threads may hold a lock of one that it has not.
    forks = forks and sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if forks else "spawn")
    indices = sorted(indices)
    pool = ProcessPoolExecutor(processes, context, initializer=_end_quietly)
    try:
        futures: dict[Future[Result | Failed], int] = {
            pool.submit(_Guarded(function), cells[index]): index for index in indices
        }
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                if len(indices) == 1:
                    yield indices[0], Failed("the process that computed it ended, for want of memory or by a signal")
            except Exception as error:  # of pickling, whose own words differ between versions of Python
                yield futures[future], Failed(f"it cannot be sent to another process: {_reason(error)}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_quietly() -> None:
    """An interrupt from the terminal reaches every process; the one that was asked says so, the others just end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _on_dask(
    function: Callable[[Cell], Result], cells: Sequence[Cell], address: str
) -> Iterator[tuple[int, Result | Failed]]:
    try:
        from dask.distributed import Client
        from dask.distributed import as_completed as completed
    except ImportError:
        raise ValueError("dask: needs dask.distributed: pip install 'persistentkv[cluster]'") from None
    try:
        client = Client(address, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise ValueError(f"dask: cannot reach {address}: {_reason(error)}") from None
    with client:
        # The function carries the trace: it goes to each worker once, not with every cell.
        shared: Any = client.scatter(_Guarded(function), broadcast=True, hash=False)
        futures = {client.submit(_call, shared, cell, pure=False): index for index, cell in enumerate(cells)}
        for future in completed(futures):
            raised = future.exception()
            yield futures[future], future.result() if raised is None else Failed(_reason(raised))


def _call(function: Callable[[Cell], Result], cell: Cell) -> Result:
    return function(cell)
