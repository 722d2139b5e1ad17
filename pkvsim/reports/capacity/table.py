"""A capacity search as a table on stdout."""
from __future__ import annotations

from pkvsim.reports.capacity.columns import NONE, table
from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.studies.capacity.result import CapacitySearch

RANK_WORDS = {
    "rate": "highest rate first", "rate_per_gpu": "highest rate per GPU first", "gpus": "fewest GPUs first",
    "dollars": "cheapest million tokens first",
}  # fmt: skip


def print_capacity(search: CapacitySearch) -> None:
    """Every server a row, best first; reasons and notes below."""
    console = table_console()
    wanted = "" if search.wanted_rate_per_s is None else f" at {search.wanted_rate_per_s:g} requests/s"
    print_line(
        console,
        f"{search.trace.name}: {len(search.trace):,} requests; what keeps {', '.join(map(str, search.objectives))}"
        f"{wanted}, {RANK_WORDS[search.rank]}",
    )
    heads, rows = table(search)
    words = {at for at in range(len(heads)) if any(_is_word(row[at]) for row in rows)}
    print_grid(console, [Column(head, "left" if at in words else "right") for at, head in enumerate(heads)], rows)
    for note in search.notes:
        print_line(console, f"- {note}")


def _is_word(text: str) -> bool:
    return text != NONE and not text[:1].isdigit()
