"""pkvsim step --kv-parallel."""
from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import numpy as np

    from pkvsim.options import AttentionOptions
    from pkvsim.shapes import DecodeShape


def step_over_gpus(
    shape: DecodeShape, lens: np.ndarray, device: str, ranks: int, options: AttentionOptions, *,
    names: list[str] | None, splits: int | None, layers: int, plot: str | None, timeline: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Explains a step whose rows' pages `ranks` GPUs hold together. ValueError naming the option."""
    from pkvsim.devices.device import get_device
    from pkvsim.schedule.shares import MAX_RANKS
    from pkvsim.shapes import check_int
    from pkvsim.studies.several.kv_parallel import ROUTE, explain_kv_parallel

    check_int("kv_parallel", ranks, 1, MAX_RANKS)
    if names not in (None, [ROUTE]):
        raise ValueError(f"routes: expected {ROUTE} alone with kv_parallel, got {', '.join(names)}")
    for option, given in (("splits", splits), ("timeline", timeline)):
        if given is not None:
            raise ValueError(f"{option}: expected None with kv_parallel, got {given}")
    report = explain_kv_parallel(shape, lens, get_device(device), num_ranks=ranks, layers=layers, options=options)
    if plot is not None:
        from pkvsim.reports.plot_step import plot_step

        plot_step(report.whole, plot, ranks=report.ranks)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        return
    from pkvsim.reports.several.table_kv_parallel import print_kv_parallel

    print_kv_parallel(report)
