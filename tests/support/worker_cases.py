"""A function that cells of test_workers call, in a module that another process imports quickly."""
from __future__ import annotations

import os

SEEN: list[int] = []


def work(cell: int, *, end_at: int = -1) -> int:
    """A cell's square; refused where it divides by 5, a bug where by 7, and the end of the process at end_at."""
    if cell == end_at:
        os._exit(1)
    if cell % 7 == 0:
        raise KeyError("seven")
    if cell % 5 == 0:
        raise ValueError(f"cell: expected no multiple of 5,\ngot {cell}")
    return cell * cell


def seen(cell: int) -> int:
    """How much of SEEN the process has."""
    return len(SEEN)
