"""Tables of kernel times outside paged decode attention, as gpu.calibrate.outside writes them."""
from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MATRIX, ATTENTION, ELEMENTWISE, SAMPLING, HEAT, HOST, ALL_REDUCE = KERNELS = (
    "matrix", "attention", "elementwise", "sampling", "heat", "host", "all_reduce",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One timed kernel. tokens: of the product, chunk or step, rows of sampling, GPUs of an all-reduce; past: tokens
    cached before the chunk, or how long the GPU had been busy (us, heat); bytes: moved, of each GPU in a sum."""

    kernel: str  # one of KERNELS
    kind: str  # matrices: one of pkvsim.outside.matrices.KINDS; otherwise which kernel
    tokens: int = 0
    out_features: int = 0
    in_features: int = 0
    past: int = 0
    bytes: int = 0
    us: float = 0.0


def write_kernel_times(path: str | Path, times: Iterable[KernelTime]) -> None:
    """A CSV with a header."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(KernelTime)])
        writer.writeheader()
        writer.writerows(asdict(time) | {"us": f"{time.us:.4g}"} for time in times)


def read_kernel_times(path: str | Path) -> list[KernelTime]:
    """What write_kernel_times wrote; ValueError naming file, line and field."""
    types = {field.name: field.type for field in fields(KernelTime)}
    found = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if set(reader.fieldnames or ()) != set(types):
                got = ", ".join(reader.fieldnames or ())
                raise ValueError(f"{path}: expected columns {', '.join(types)}, got {got}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if row["kernel"] not in KERNELS:
                    raise ValueError(f"{where}: kernel: expected one of {', '.join(KERNELS)}, got {row['kernel']!r}")
                try:
                    numbers = {name: int(row[name]) for name, kind in types.items() if kind == "int"}
                    us = float(row["us"])
                except (TypeError, ValueError):
                    raise ValueError(f"{where}: expected numbers, got {row!r:.120}") from None
                if not 0 < us < float("inf"):
                    raise ValueError(f"{where}: us: expected a number > 0, got {us}")
                found.append(KernelTime(kernel=row["kernel"], kind=row["kind"], us=us, **numbers))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read kernel times: {error}") from None
    return found
