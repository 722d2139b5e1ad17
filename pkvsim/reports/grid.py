"""Tables on stdout that keep every figure and name whole: too wide for the terminal, they go on below."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 160  # of output that goes to a pipe or a file
MIN_TEXT = 16  # columns that a column of sentences keeps
GAP = 3  # columns between two cells: a space on both sides and a line


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head, which may have several lines, and how its cells stand."""

    head: str
    align: Literal["left", "right"] = "right"
    text: bool = False  # sentences, which may be wrapped between words; figures and names are not


def table_console() -> Console:
    """As wide as the terminal; wide enough for most tables in a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_COLUMNS)


def print_line(console: Console, text: str | Text, *, markup: bool = False) -> None:
    """A sentence: wrapped between words on a terminal, one line in a pipe, where it may be searched."""
    if isinstance(text, str):
        text = Text.from_markup(text) if markup else Text(text)
    if console.is_terminal:
        text.overflow = "fold"
        console.print(text)
    else:
        console.print(text, soft_wrap=True)


def print_grid(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],  # [rows][columns]
    *,
    title: str = "",
    styles: Sequence[str | None] = (),  # of the rows
) -> None:
    """A table. Where its columns do not fit side by side, those that do come first and the others in further tables
    below, each of which begins with the first column. A cell wider than the terminal is folded, never cut."""
    if title:
        print_line(console, title)
    widths = [_width(column, [row[at] for row in rows]) for at, column in enumerate(columns)]
    for group in _groups(widths, console.width):
        table = Table(show_edge=False, pad_edge=False)
        for at in group:
            column = columns[at]
            # A name alone in its place may be wider than the screen.
            whole = not column.text and sum(widths[one] + GAP for one in group) - GAP <= console.width
            table.add_column(Text(column.head), justify=column.align, no_wrap=whole, overflow="fold")
        for at, row in enumerate(rows):
            cells = (Text(cell) if isinstance(cell, str) else cell for cell in (row[one] for one in group))
            table.add_row(*cells, style=styles[at] if styles else None)
        console.print(table)


def _width(column: Column, cells: list[str | Text]) -> int:
    """Columns of the terminal that it needs: of a column of sentences, what it must have."""
    texts = [column.head, *(str(cell) for cell in cells)]
    widest = max(cell_len(line) for text in texts for line in text.split("\n"))
    return min(widest, max(MIN_TEXT, cell_len(column.head))) if column.text else widest


def _groups(widths: list[int], available: int) -> list[list[int]]:
    """Columns that stand side by side: the first one in every group, and as many others as fit, at least one."""
    groups: list[list[int]] = [[0]]
    used = widths[0]
    for at in range(1, len(widths)):
        if len(groups[-1]) > 1 and used + GAP + widths[at] > available:
            groups.append([0])
            used = widths[0]
        groups[-1].append(at)
        used += GAP + widths[at]
    return groups
