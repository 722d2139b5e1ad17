"""What the benchmark scripts that measure in a pool do alike: what they were run on, the pool, and the end."""
from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from gpu.measure.environment import environment, lacks_gpu, write_json

Cell = TypeVar("Cell")


def run_script(
    program: str, args: argparse.Namespace, measure: Callable[[float, Any], dict[str, Any]], *, pool_gib: float,
    width: int,
) -> int:  # fmt: skip
    """A script's exit code: 1 without a GPU, 2 where --pool-gib is more than the GPU has free, else 0.

    args: has pool_gib and json. measure(pool_gib, console): prints what it found, and returns it as entries of the JSON
    document. pool_gib: what the pool takes by default, or what fits of it. width: of the output that is no terminal's.
    """
    if lacks_gpu(program):
        return 1
    from rich.console import Console

    from gpu.measure import memory

    console = Console(width=None if sys.stdout.isatty() else width)
    about = environment()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    start = time.perf_counter()
    try:
        granted = memory.budget(pool_gib, args.pool_gib)
    except ValueError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    found = measure(granted.granted_gib, console)
    console.print(f"{granted}, {time.perf_counter() - start:.0f} s")
    if args.json is not None:
        options = {key: str(value) for key, value in vars(args).items()}
        write_json(args.json, {"environment": about, "options": options, "pool": dataclasses.asdict(granted),
                               "peak_gpu_bytes": memory.peak_bytes(), **found})  # fmt: skip
        console.print(f"wrote {args.json}")
    console.print(memory.peak_line())
    return 0


def chosen(program: str, text: str, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of those numbers, from 0, or all. Ends the program with a line where a number is none of them."""
    if text == "all":
        return list(cells)
    try:
        return [cells[int(number)] for number in text.split(",")]
    except (ValueError, IndexError):
        raise SystemExit(f"{program}: --cells: expected numbers from 0 to {len(cells) - 1}, got {text!r}") from None


def print_notes(console: Any, what: str, notes: Iterable[str]) -> None:
    """A line for each: "not timed: ..."."""
    for note in notes:
        console.print(f"{what}: {note}", markup=False)
