"""pkvsim devices."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors


def devices(
    names: Annotated[
        Optional[list[str]], typer.Argument(metavar="NAME", help="Show every number of these (names or .json files).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an array of device files.")] = False,
) -> None:
    """Lists the GPUs; for those named, every number and where it comes from.

    \b
    Examples:
      pkvsim devices
      pkvsim devices rtx4090 h100_sxm
      pkvsim devices h200 --json
    """
    with one_line_errors():
        from pkvsim.devices.device import DEVICES, get_device

        chosen = [get_device(name) for name in names or DEVICES]
    if as_json:
        typer.echo(json.dumps([json.loads(device.to_json()) for device in chosen], indent=2))
        return
    from pkvsim.reports.table_replay import print_catalogue, print_devices

    (print_devices if names else print_catalogue)(chosen)
