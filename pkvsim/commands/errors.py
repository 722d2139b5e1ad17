"""How the commands report what is wrong: one line on stderr, exit code 2."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError of the block into one line on stderr and exit code 2."""
    try:
        yield
    except ValueError as error:
        print_error(str(error))
        raise typer.Exit(2) from None


def print_error(message: str) -> None:
    """`message` on one line of stderr."""
    typer.echo("pkvsim: error: " + " ".join(message.split()), err=True)
