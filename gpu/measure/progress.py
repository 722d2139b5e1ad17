"""Progress of long measurements on stderr: a bar on a terminal, a plain line now and then in a pipe."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

LINE_EVERY_S = 10.0

Item = TypeVar("Item")


def tracked(items: Sequence[Item], label: str, name: Callable[[Item], str] = str) -> Iterator[Item]:
    """The items in order, telling which one of how many is under way."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    start = told = time.perf_counter()
    if not console.is_terminal:
        for index, item in enumerate(items):
            now = time.perf_counter()
            if index == 0 or now - told >= LINE_EVERY_S:
                print(
                    f"{label}: {index + 1} of {len(items)}, {name(item)}, {now - start:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                told = now
            yield item
        print(
            f"{label}: {len(items)} of {len(items)} done, {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=len(items))
        for item in items:
            progress.update(task, description=f"{label}: {name(item)}")
            yield item
            progress.advance(task)


def note(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)
