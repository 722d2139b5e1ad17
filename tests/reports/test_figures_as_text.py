"""Times, figures and heat maps as people read them."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.reports.table_serving import digits, seconds
from pkvsim.reports.table_sweep import GOOD, print_sweep
from pkvsim.studies.sweep import Sweep

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
LIMITS = {"us": 1000, "ms": 1000, "s": 600, "min": 180, "h": np.inf}  # exclusive


@given(st.one_of(st.floats(1e-9, 1e6), st.sampled_from([0.0009996, 0.9996, 599.6, 10799.9, 1.0, 600.0, 10800.0])))
def test_a_time_is_right_to_three_digits_in_the_unit_that_it_is_short_in(value):
    number, unit = seconds(value).replace(",", "").split()
    assert "e+" not in number and float(number) < LIMITS[unit]
    assert float(number) * UNITS[unit] == pytest.approx(value, rel=0.017 if unit == "h" else 0.0051)


@given(st.floats(1e-3, 1e15), st.integers(1, 6))
def test_large_figures_have_no_power_of_ten(value, count):
    text = digits(value, count)
    assert "e+" not in text and float(text.replace(",", "")) == pytest.approx(value, rel=0.51 * 10 ** (1 - count))


@pytest.mark.parametrize("metric", ["us", "ttft_s.p99", "e2e_s.p99", "itl_s.p50", "saturated"])
def test_less_time_is_green(metric, capsys, monkeypatch):
    from rich.console import Console

    good = GOOD + 1  # as a style keeps the codes of the first console that prints it, which may have fewer colours
    monkeypatch.setattr("pkvsim.reports.table_sweep.GOOD", good)
    monkeypatch.setattr(
        "pkvsim.reports.table_sweep.table_console",
        lambda: Console(force_terminal=True, color_system="truecolor", width=80),
    )
    name, _, part = metric.partition(".")
    cells = tuple({name: {part: value} if part else value} for value in (1, 2))
    print_sweep(Sweep({"device": ("a", "b")}, cells), metric)
    lines = capsys.readouterr().out.split("\n")
    green = "48;2;" + ";".join(map(str, good))
    assert [green in line for line in lines if line.lstrip("\x1b[0m").strip()[:1] in ("a", "b")] == [True, False]


def test_a_route_stands_under_its_own_price_alone(capsys):
    cells = ({"us": 3.0, "route": "balanced", "routes_us": {"balanced": 3.0, "split": 4.0}},)
    for metric, shown in (("us", True), ("routes_us.split", False)):
        print_sweep(Sweep({"batch": (1,)}, cells), metric)
        assert ("balanced" in capsys.readouterr().out) == shown
