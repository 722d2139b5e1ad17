"""Tables keep every figure and name whole at any width."""
from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pkvsim.reports.grid import GAP, Column, print_grid

CELLS = st.text("abcdefgh019.,%/_-é漢", max_size=30)
TABLES = st.integers(1, 14).flatmap(
    lambda columns: st.tuples(
        st.lists(CELLS, min_size=columns, max_size=columns),
        st.lists(st.lists(CELLS, min_size=columns, max_size=columns), max_size=4),
    )
)


@given(TABLES, st.integers(30, 120))
def test_nothing_is_cut_and_no_line_is_too_long(table, width):
    heads, rows = table
    out = io.StringIO()
    columns = [Column(head, "left" if at == 0 else "right") for at, head in enumerate(heads)]
    print_grid(Console(file=out, width=width, force_terminal=True, color_system=None), columns, rows)
    shown = out.getvalue()
    assert "…" not in shown
    assert max(map(cell_len, shown.split("\n"))) <= width
    first = max(cell_len(cells[0]) for cells in (heads, *rows))
    for cells in (heads, *rows):
        for at, cell in enumerate(cells):
            widest = max(cell_len(one[at]) for one in (heads, *rows))
            if widest + (first + GAP) * (at > 0) <= width and widest <= width - first - GAP:
                assert cell in shown


def test_columns_that_do_not_fit_go_below_with_the_first_one():
    out = io.StringIO()
    console = Console(file=out, width=30, force_terminal=True, color_system=None)
    print_grid(console, [Column("route", "left"), Column("one"), Column("two")], [("split", "1" * 12, "2" * 12)])
    assert [line.rstrip() for line in out.getvalue().splitlines() if "route" in line or "split" in line] == [
        "route ┃          one", "split │ 111111111111", "route ┃          two", "split │ 222222222222",
    ]  # fmt: skip
