"""Tables of measured kernel variants: which (warps, stages) a shape runs with on a GPU.

A table is a JSON file, {"compute_capability", "gpu", "source", "entries": [{"head_dim", "group_size", "dtype", "warps",
"stages"}, ..]}. `python -m gpu.tune` writes one; gpu/kernels/tables/ those of the project, and the environment variable
PKV_TUNED names one of the user's own.
"""
from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from pkvsim import DecodeShape

SHIPPED = Path(__file__).with_name("tables")
ENTRY_FIELDS = ("head_dim", "group_size", "dtype", "warps", "stages")


@functools.cache
def read_table(path: Path) -> dict:
    """A table as its JSON object. Raises ValueError naming the file and what is wrong in it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read a table of tuned variants: {error}") from None
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(table.get("compute_capability") if entries is not None else None, int) or not isinstance(
        entries, list
    ):
        raise ValueError(f"{path}: expected an object with compute_capability and entries")
    for index, entry in enumerate(entries):
        numbers = [entry.get(name) if isinstance(entry, dict) else None for name in ENTRY_FIELDS if name != "dtype"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers) or not isinstance(
            entry.get("dtype"), str
        ):
            raise ValueError(f"{path}: entries[{index}]: expected {', '.join(ENTRY_FIELDS)}, got {entry!r}")
    return table


def _table(compute_capability: int) -> dict | None:
    named = os.environ.get("PKV_TUNED")
    if named:
        table = read_table(Path(named))
        return table if table["compute_capability"] == compute_capability else None
    shipped = SHIPPED / f"sm_{compute_capability}.json"
    return read_table(shipped) if shipped.exists() else None


def tuned_choice(shape: DecodeShape, dtype: str, compute_capability: int) -> tuple[tuple[int, int], ...]:
    """The (warps, stages) of the tuned group size next above the shape's, or below where there is none; else ()."""
    table = _table(compute_capability)
    entries = [e for e in table["entries"] if (e["head_dim"], e["dtype"]) == (shape.head_dim, dtype)] if table else []
    if not entries:
        return ()
    best = min(entries, key=lambda e: (e["group_size"] < shape.group_size, abs(e["group_size"] - shape.group_size)))
    return ((best["warps"], best["stages"]),)
