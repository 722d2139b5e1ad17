"""What the commands say on stderr: what is wrong (one line, exit code 2), and what a timeline leaves out."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError of the block, or a lack of memory for what it was asked, into one line on stderr and exit
    code 2."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        print_error(str(error) or "not enough memory")
        raise typer.Exit(2) from None


def print_error(message: str) -> None:
    """`message` on one line of stderr."""
    typer.echo("pkvsim: error: " + " ".join(message.split()), err=True)


def tell_left_out(left_out: list[str]) -> None:
    """What a bounded timeline has no events of, a line each on stderr; nothing where it has all."""
    for what in left_out:
        typer.echo(f"timeline leaves out {what}", err=True)
