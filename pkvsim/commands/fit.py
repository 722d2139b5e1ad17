"""pkvsim fit."""
from __future__ import annotations

from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors


def fit(
    device_base: Annotated[str, typer.Option(help="The GPU they ran on: a name of `pkvsim devices`, or a .json file.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Device file to write.")],
    route: Annotated[
        Optional[list[str]], typer.Option(help="Fit only this route; repeatable. All of the table by default.")
    ] = None,
    table_device: Annotated[
        Optional[str], typer.Option(help="Which GPU's rows to take, where the table has several.")
    ] = None,
    free: Annotated[
        Optional[str], typer.Option(help="Constants to fit, separated by commas; the others stay the base's.")
    ] = None,
    keep_host: Annotated[
        bool, typer.Option(help="The host's times of --measurements stay the base's; only the GPU's are fitted.")
    ] = False,
    name: Annotated[Optional[str], typer.Option(help="Name of the fitted device; the base's by default.")] = None,
    measurements: Annotated[
        Optional[list[str]],
        typer.Option(help="CSV of measured attention times, of gpu.calibrate or a published table; repeatable."),
    ] = None,
    serving: Annotated[
        Optional[list[str]],
        typer.Option(help="CSV of serving points (mean TTFT and TPOT of closed loops), fitted engine by engine."),
    ] = None,
    outside: Annotated[
        Optional[list[str]],
        typer.Option(help="CSV of kernel times outside decode attention, of gpu.calibrate --outside; repeatable."),
    ] = None,
    served: Annotated[
        Optional[list[str]],
        typer.Option(help="Steps (.npz) or cells (.json) of examples/bench_serve.py, of gpu.serve; repeatable."),
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Whose steps --served has; by default the model that its cells name.")
    ] = None,
    selection: Annotated[
        Optional[list[str]],
        typer.Option(help="JSON of examples/bench_selection.py, of selected pages; repeatable."),
    ] = None,
) -> None:
    """Fits the model's constants to measured times and writes a device file.

    --measurements fits decode attention, --selection steps that read selected pages, --outside, --serving and
    --served what stands beside decode attention; one or more of them.

    \b
    Examples:
      pkvsim fit --measurements mygpu.csv --device-base rtx4090 -o mygpu.json
      pkvsim fit --measurements peer.csv --table-device l40s \\
          --device-base l40s -o l40s_fitted.json
      pkvsim fit --serving points.csv --device-base h200 -o h200_fitted.json
      pkvsim fit --served steps.npz --served cells.json --device-base h200 \\
          -o h200_fitted.json
      pkvsim fit --selection grid.json --device-base h200 -o h200_fitted.json
    """
    with one_line_errors():
        from dataclasses import replace
        from datetime import date
        from pathlib import Path

        from pkvsim.devices.device import get_device
        from pkvsim.fitting.fit_device import fit_device, select
        from pkvsim.fitting.fit_serving import PointErrors, fit_serving
        from pkvsim.fitting.measured_tables import read_measurements
        from pkvsim.reports.table_replay import print_fit, print_outside_fit

        if not (measurements or serving or served or outside or selection):
            raise ValueError("measurements: expected --measurements, --serving, --served, --outside or --selection")
        fitted, today = get_device(device_base), date.today().isoformat()
        routes: set[str] = set()
        skipped: dict[str, int] = {}
        held_out: dict[str, PointErrors] = {}
        if measurements:
            table = [m for path in measurements for m in read_measurements(path)]
            chosen = select(table, table_device=table_device, routes=route)
            fitted, skipped = fit_device(
                fitted,
                chosen,
                free=None if free is None else tuple(free.split(",")),
                keep_host=keep_host,
                source=", ".join(Path(path).name for path in measurements),
                date=today,
            )
            routes = {m.route for m in chosen} - set(skipped)
        if outside:
            from pkvsim.fitting.fit_outside import fit_outside
            from pkvsim.fitting.outside_table import read_kernel_times
            from pkvsim.outside.derive import outside_entry

            kernels = [time for path in outside for time in read_kernel_times(path)]
            start = outside_entry(fitted, "pytorch").constants
            source = ", ".join(Path(path).name for path in outside)
            fitted = fit_outside(fitted, kernels, start, source=source, date=today)
        if serving:
            from pkvsim.fitting.serving_points import read_points

            points = [point for path in serving for point in read_points(path)]
            source = ", ".join(Path(path).name for path in serving)
            fitted, held_out = fit_serving(fitted, points, source=source, date=today)
        if served:
            from pkvsim.studies.served.fit import fit_files

            fitted = fit_files(served, fitted, model=model, date=today)
        if selection:
            from pkvsim.fitting.selection.cells import read_selection_cells
            from pkvsim.fitting.selection.fit_selection import fit_selection

            files = [read_selection_cells(path) for path in selection]
            cells, source = [cell for found, _ in files for cell in found], "; ".join(about for _, about in files)
            fitted, unseen = fit_selection(fitted, cells, source=source, date=today)
        fitted = replace(fitted, name=name or fitted.name)
        try:
            Path(output).write_text(fitted.to_json(), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"output: cannot write {output}: {error.strerror}") from None
    if measurements:
        print_fit(fitted, routes, skipped)
    if serving or served or outside:
        print_outside_fit(fitted, held_out)
    if selection:
        from pkvsim.reports.selection.table_fit import print_selection_fit

        print_selection_fit(fitted, cells, unseen)
