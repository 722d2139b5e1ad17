"""pkvsim fit."""
from __future__ import annotations

from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors


def fit(
    measurements: Annotated[
        list[str], typer.Option(help="CSV of measured step times, of gpu.calibrate or a published table; repeatable.")
    ],
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
    name: Annotated[Optional[str], typer.Option(help="Name of the fitted device; the base's by default.")] = None,
) -> None:
    """Fits the model's constants to measured times and writes a device file.

    \b
    Examples:
      pkvsim fit --measurements mygpu.csv --device-base rtx4090 -o mygpu.json
      pkvsim fit --measurements peer.csv --table-device l40s \\
          --device-base l40s -o l40s_fitted.json
    """
    with one_line_errors():
        from datetime import date
        from pathlib import Path

        from pkvsim.devices.device import get_device
        from pkvsim.fitting.fit_device import fit_device, select
        from pkvsim.fitting.measured_tables import read_measurements
        from pkvsim.reports.table_replay import print_fit

        base = get_device(device_base)
        table = [m for path in measurements for m in read_measurements(path)]
        chosen = select(table, table_device=table_device, routes=route)
        fitted, skipped = fit_device(
            base,
            chosen,
            free=None if free is None else tuple(free.split(",")),
            source=", ".join(Path(path).name for path in measurements),
            date=date.today().isoformat(),
            name=name,
        )
        try:
            Path(output).write_text(fitted.to_json(), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"output: cannot write {output}: {error.strerror}") from None
    print_fit(fitted, {m.route for m in chosen} - set(skipped), skipped)
