"""The pkvsim command: the subcommands, one module of pkvsim.commands each.

Exit codes: 0 done, 1 output could not be written, 2 bad input, 130 interrupted, 141 the reader of a pipe went away.
"""
from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from pkvsim.commands import capacity, devices, fit, models, replay, step, sweep, trace, whatif
from pkvsim.commands.errors import print_error
from pkvsim.compiled.notice import compile_notice

COMMANDS = (
    capacity.capacity, devices.devices, fit.fit, models.models, replay.replay, step.step, sweep.sweep, trace.trace,
    whatif.whatif,
)  # fmt: skip
UNWRITTEN, BAD_INPUT = 1, 2
INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as a shell names those who die of them

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    import platform

    import numba

    from pkvsim import __version__

    typer.echo(f"pkvsim {__version__} (Python {platform.python_version()}, Numba {numba.__version__})")
    raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Replays decode traffic on models of GPUs, without a GPU.

    \b
    Examples:
      pkvsim devices
      pkvsim replay --family bimodal --device rtx3060
      pkvsim whatif --trace requests.csv --device h200
      pkvsim --install-completion
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in COMMANDS:
    # The help of pkvsim shows a first sentence whole; typer's own choice is cut at 45 letters.
    app.command(short_help=(_command.__doc__ or "").split("\n")[0])(_command)


def main() -> None:
    """Console entry point: every way to end is an exit code and at most one line on stderr."""
    if sys.stdout is None:  # Python's, where a shell has closed it: `pkvsim devices >&-`
        print_error("cannot write the output: standard output is closed")
        sys.exit(UNWRITTEN)
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _unwritten(error)
    sys.exit(code)


def _run() -> int:
    usage_error: Any = typer.BadParameter.__mro__[1]  # typer names no base class of its option errors
    try:
        with compile_notice():
            code = app(standalone_mode=False, prog_name="pkvsim")
    except usage_error as error:
        print_error(error.format_message())
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        return _unwritten(error)
    except SystemExit as stop:
        if isinstance(stop.__context__, OSError):  # typer and rich end so when the reader of a pipe goes away
            return _unwritten(stop.__context__)
        raise
    if code == INTERRUPTED:  # typer itself makes the code of an interrupt
        print_error("interrupted")
    return code if isinstance(code, int) else 0


def _unwritten(error: OSError) -> int:
    """Exit code of a command whose output could not be written; the reader of a pipe may leave, which is no error."""
    # What is still buffered goes nowhere, so that the interpreter does not fail on it again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    print_error(f"cannot write the output: {error.strerror or error}")
    return UNWRITTEN
