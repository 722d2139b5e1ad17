"""What scripts do alike: errors in a line; of benchmarks what they were run on, the pool of those that measure in one,
and the end."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from gpu.measure import memory
from gpu.measure.environment import environment, lacks_gpu, missing, options_of, write_json

Cell = TypeVar("Cell")


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Makes a ValueError of the block, a file that cannot be read or written, or a lack of memory one line on stderr
    and exit code 2. Decorates mains too."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # PyTorch's
            raise
        print(f"{program}: error: {reason_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def reason_of(error: BaseException) -> str:
    """What an error says, in a line: of a lack of memory what was asked for, and not who else has how much of it."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ". ".join(said.split(". ")[:2]).rstrip(".") or "not enough memory"
    return said


def run_script(
    program: str, args: argparse.Namespace, measure: Callable[[Any], dict[str, Any]], *, width: int,
    needs_gpu: bool = True, leads: bool = True,
) -> int:  # fmt: skip
    """A script's exit code: 1 without a GPU or where what was found has a false "sound", else 0. Ends the program with
    2 and a line on stderr where what was asked for has no room or cannot be.

    args: has json, a path or None. measure(console): prints what it found, and returns it as entries of the JSON
    document. width: of the output that is no terminal's. needs_gpu: else the script goes on without one. leads: False
    in those processes of several whose output nobody waits for.
    """
    if needs_gpu and lacks_gpu(program):
        return 1
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else width, quiet=not leads)
    on_gpu = needs_gpu or missing() is None
    about = environment() if on_gpu and leads else {}
    if about:
        console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    start = time.perf_counter()
    with one_line_errors(program):
        found = measure(console)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if args.json is not None and leads:
        peak = {"peak_gpu_bytes": memory.peak_bytes()} if on_gpu else {}
        write_json(args.json, {"environment": about, "options": options_of(args), **peak, **found})
        console.print(f"wrote {args.json}")
    if on_gpu:
        console.print(memory.peak_line())
    return int(found.get("sound", True) is False)


def in_pool(
    args: argparse.Namespace, measure: Callable[[argparse.Namespace, float, Any], dict[str, Any]], *, pool_gib: float,
    beside: float = 1.0,
) -> Callable[[Any], dict[str, Any]]:  # fmt: skip
    """What run_script calls for measure(args, pool_gib, console), which is told how much its pool may take.

    args: has pool_gib, which is what was asked for, or None. pool_gib: what the pool takes by default, or what fits of
    it. beside: what is allocated in proportion to the pool, the pool included.
    """

    def measured(console: Any) -> dict[str, Any]:
        granted = memory.budget(pool_gib, args.pool_gib, beside=beside)
        found = measure(args, granted.granted_gib, console)
        console.print(str(granted))
        return {"pool": dataclasses.asdict(granted), **found}

    return measured


def chosen(program: str, text: str, cells: Sequence[Cell], **named: Cell) -> list[Cell]:
    """The cells of those numbers, from 0, or names, or all that have numbers. Ends the program with a line where a word
    is none of them."""
    if text == "all":
        return list(cells)
    try:
        return [named[word] if word in named else cells[int(word)] for word in text.split(",")]
    except (ValueError, IndexError):
        words = ", ".join((f"numbers from 0 to {len(cells) - 1}", *named))
        raise SystemExit(f"{program}: --cells: expected {words} or all, got {text!r}") from None


def print_notes(console: Any, what: str, notes: Iterable[str]) -> None:
    """A line for each: "not timed: ..."."""
    for note in notes:
        console.print(f"{what}: {note}", markup=False)
