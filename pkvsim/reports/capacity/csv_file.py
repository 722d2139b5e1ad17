"""A capacity search as comma-separated values: a line a server, every figure at full precision."""
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pkvsim.reports.plots import check_folder
from pkvsim.studies.capacity.result import Capacity, CapacitySearch

FIGURES = (
    "rate_per_s", "missed_rate_per_s", "output_tokens_per_s", "prompt_tokens_per_s", "gpus_per_replica", "replicas",
    "gpus", "dollars_per_hour", "dollars_per_million_output_tokens", "dollars_per_million_tokens",
)  # fmt: skip


def check_csv_path(path: str | Path) -> Path:
    """`path`, if the file can be written there; ValueError otherwise. Long work asks before it starts."""
    if Path(path).suffix.lower() != ".csv":
        raise ValueError(f"csv: expected a file ending in .csv, got {str(path)!r}")
    check_folder(path, option="csv")
    return Path(path)


def write_csv(search: CapacitySearch, path: str | Path) -> None:
    """Writes the file. ValueError as check_csv_path, or where writing fails."""
    path = check_csv_path(path)
    objectives = [f"{one.name}_s" for one in search.objectives]
    heads = ["rank", *search.axes, *FIGURES, *objectives, "good_request_share", "good_requests_per_s",
             "good_tokens_per_s", "missed", "reason"]  # fmt: skip
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(heads)
            for at, cell in enumerate(search.cells, 1):
                one = cell.capacity
                figures = _figures(one) if one is not None else [""] * (len(FIGURES) + len(objectives) + 4)
                rows.writerow([at if one else "", *cell.place.values(), *figures, cell.reason])
    except OSError as error:
        raise ValueError(f"csv: cannot write {path}: {error.strerror or error}") from None


def _figures(one: Capacity) -> list[Any]:
    figures = [getattr(one, name) for name in FIGURES] + [outcome.value_s for outcome in one.outcomes]
    figures += [one.goodput.request_share, one.goodput.requests_per_s, one.goodput.tokens_per_s]
    return ["" if value is None else value for value in figures] + [" ".join(one.missed)]
