"""A line for every request of every run, as CSV."""
from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pkvsim.reports.plots import check_folder
from pkvsim.serving.results.logs import RequestLog
from pkvsim.studies.whatif import REJECTIONS, WhatIf

TIMES = ("arrival_s", "queue_s", "ttft_s", "tpot_s", "e2e_s", "finish_s")
TIERS = ("load_s", "loaded_tokens")  # columns of runs with tiers
COUNTS = ("replica", "prompt_tokens", "output_tokens", "hit_tokens", "preemptions")


def check_csv_path(path: str | Path) -> Path:
    """`path`, if a table can be written there; ValueError otherwise. Long work asks before it starts."""
    if Path(path).suffix.lower() != ".csv":
        raise ValueError(f"requests_csv: expected a file ending in .csv, got {str(path)!r}")
    check_folder(path, option="requests_csv")
    return Path(path)


def write_requests(report: WhatIf, path: str | Path) -> None:
    """Writes a header and a line for each policy and request: times in seconds, empty where there are none.

    ValueError as check_csv_path, or where writing fails.
    """
    path = check_csv_path(path)
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            tiers = TIERS if any(result.tiers is not None for result in report.results.values()) else ()
            lines.writerow(("policy", "request", "session", *TIMES, *COUNTS, "rejected", *tiers))
            for policy, result in report.results.items():
                rows = _lines(result.requests, report.trace.session)
                if result.tiers is not None:
                    log = result.tiers.log
                    loads = zip(map(_time, log.load_s.tolist()), log.tokens.sum(axis=1).tolist())
                    rows = ((*row, *load) for row, load in zip(rows, loads))
                lines.writerows((policy, *line) for line in rows)
    except OSError as error:
        raise ValueError(f"requests_csv: cannot write {path}: {error.strerror or error}") from None


def _lines(requests: RequestLog, session: np.ndarray | None) -> Iterable[tuple[Any, ...]]:
    reasons = {reason: name for name, reason in REJECTIONS.items()}
    n = len(requests.arrival_s)
    sessions = [""] * n if session is None else ["" if value < 0 else value for value in session.tolist()]
    times = ([_time(value) for value in getattr(requests, name).tolist()] for name in TIMES)
    counts = (getattr(requests, name).tolist() for name in COUNTS)
    return zip(range(n), sessions, *times, *counts, [reasons.get(reason, "") for reason in requests.rejected.tolist()])


def _time(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.9g}"
