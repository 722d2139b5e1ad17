"""A table as data, printed on a terminal or written as Markdown."""
from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; note: sentences below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: expected {len(self.columns)} cells, got {len(row)}: {row}")

    def markdown(self, *, level: int = 3) -> str:
        """Title, table and note; numbers to the right."""
        lines = [
            f"{'#' * level} {self.title}",
            "",
            "| " + " | ".join(self.columns) + " |",
            "|" + "|".join("---:" if self._is_number(column) else "---" for column in range(len(self.columns))) + "|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n" + (f"\n{self.note}\n" if self.note else "")

    def print(self, console: Console) -> None:
        from rich.markup import escape
        from rich.table import Table as RichTable

        shown = RichTable(title=escape(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            shown.add_column(escape(column), justify="right" if self._is_number(index) else "left", no_wrap=True)
        for row in self.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        if self.note:
            console.print(self.note, markup=False, highlight=False)

    def _is_number(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", "-")]
        return bool(cells) and all(cell.lstrip("+-")[:1].isdigit() for cell in cells)


def us(value: float | None) -> str:
    """A time in us with four digits, or a dash."""
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def ratio(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, or a dash."""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.2f} ± {deviation:.2f}"
