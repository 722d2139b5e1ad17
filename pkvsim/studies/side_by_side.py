"""Runs of equal standing at the same time, in threads: the compiled serving loop runs without Python's lock.

Threads share what was compiled and the trace, and begin at once; cells that a failure of another must not reach, or
that spend their time in Python, are pkvsim.studies.workers' matter.
"""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


class Stopped(Exception):
    """Another run has failed, or the user has interrupted."""


def side_by_side(
    run: Callable[[str, Progress], Result],
    names: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Result]:
    """run(name, report) of every name, as many at a time as this process has cores, in the order of the names.

    report: called by a run from time to time, it raises Stopped once another run has failed or the caller was
    interrupted. progress: told each report with its name, one at a time. What a run raises is raised here.
    """
    stopped, lock = threading.Event(), threading.Lock()

    def run_one(name: str) -> Result:
        def report(done: int, total: int) -> None:
            if stopped.is_set():
                raise Stopped
            if progress is not None:
                with lock:
                    progress(name, done, total)

        return run(name, report)

    pool = ThreadPoolExecutor(min(len(names), _cores()))
    futures = [pool.submit(run_one, name) for name in names]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    failures = [error for one in futures if not one.cancelled() and (error := one.exception()) is not None]
    for error in failures:
        if not isinstance(error, Stopped):
            raise error
    return {name: one.result() for name, one in zip(names, futures)}


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
