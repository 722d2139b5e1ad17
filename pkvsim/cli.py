"""The pkvsim command: the subcommands, one module of pkvsim.commands each. Bad input ends with exit code 2."""
from __future__ import annotations

import sys

import typer

from pkvsim.commands import devices, fit, models, replay, step, sweep, trace, whatif
from pkvsim.commands.errors import print_error

COMMANDS = (
    devices.devices, fit.fit, models.models, replay.replay, step.step, sweep.sweep, trace.trace, whatif.whatif,
)  # fmt: skip

app = typer.Typer(
    help="Replays decode traffic on models of GPUs, without a GPU.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Replays decode traffic on models of GPUs, without a GPU."""


for _command in COMMANDS:
    app.command()(_command)


def main() -> None:
    """Console entry point; also brings option errors, which typer spreads over lines, down to one."""
    usage_error = typer.BadParameter.__mro__[1]  # typer names no base class of its option errors
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        print_error(error.format_message())
        code = 2
    except typer.Abort:
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
