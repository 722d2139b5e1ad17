"""Pictures: the same input gives the same file, labels carry units, what cannot be drawn is refused before the work."""
from __future__ import annotations

import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
from command import azure_trace, pkvsim
from hypothesis import given, settings
from hypothesis import strategies as st
from readme import README
from serving_cases import DEVICE, MODEL, crowded, poisson_trace

from pkvsim.reports.plot_serving import plot_whatif
from pkvsim.reports.plot_step import plot_step
from pkvsim.reports.plot_sweep import plot_routes, plot_sweep
from pkvsim.reports.plots import DASHES, PALETTE, PART_COLOURS, ROUTE_COLOURS, unit_of
from pkvsim.serving.costs import POLICIES
from pkvsim.serving.simulate import simulate
from pkvsim.studies.explain_step import explain_step, parse_seq_lens
from pkvsim.studies.series import PARTS, busy_parts_s, busy_shares, distribution, over_time, spread, time_edges
from pkvsim.studies.sweep import step_sweep
from pkvsim.studies.whatif import whatif

SHAPE = MODEL.shape(16)


def texts(path: Path) -> list[str]:
    return ["".join(node.itertext()) for node in xml.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def drawn(path: Path, draw) -> list[str]:
    """Draws twice in each format; the SVG's texts."""
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg", "a.png"):
        draw(path / name)
    assert (path / "a.svg").read_bytes() == (path / "b.svg").read_bytes()
    assert (path / "a.png").read_bytes().startswith(b"\x89PNG")
    return texts(path / "a.svg")


def test_a_step(tmp_path) -> None:
    report = explain_step(SHAPE, parse_seq_lens("30000,12000x3,2048x10,0"), DEVICE)
    told = drawn(tmp_path, lambda path: plot_step(report, path))
    for route in report.routes:
        (title,) = [text for text in told if text.startswith((f"{route.route}:", f"{route.route} (taken):"))]
        assert f"{route.timeline_us:,.4g} us" in title and route.why() in title
        assert ("(taken)" in title) == (route.route == report.taken)
    assert any(text.startswith("attention prices of h200: fit error") for text in told)
    assert told.count("CTA slot") == len(report.routes) and any("14 rows, 86,480 tokens" in text for text in told)
    assert {"2,048", "12,000", "30,000"} <= set(told)


@pytest.mark.parametrize("lens", ["0", "1", "300x300", "5,70000"])
def test_steps_of_any_size(tmp_path, lens) -> None:
    pytest.importorskip("matplotlib")
    plot_step(explain_step(SHAPE, parse_seq_lens(lens), DEVICE, routes=["workqueue"]), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size < 1_500_000


def test_a_run(tmp_path) -> None:
    report = whatif(poisson_trace(60, 6, 4000, 30, seed=5), MODEL, DEVICE, ["paper", "balanced", "oracle"])
    told = drawn(tmp_path, lambda path: plot_whatif(report, path))
    assert {"paper", "balanced", "oracle", *PARTS, "requests at or below, %"} <= set(told)
    assert any(re.fullmatch(r"time to first token \(TTFT\), (us|ms|s|min|h)", text) for text in told)
    assert any(re.fullmatch(r"GPU time of the whole run, (us|ms|s|min|h)", text) for text in told)


def test_sweeps(tmp_path) -> None:
    sweep = step_sweep({"batch": (1, 8, 64), "length": (1024, 16384)}, SHAPE, DEVICE, "calibrated")
    told = drawn(tmp_path, lambda path: plot_sweep(sweep, "us", path))
    cells = [f"{us:,.0f}" if us >= 100 else f"{us:.3g}" for us in sweep.values("us").ravel()]
    assert [text for text in told if text in cells][: len(cells)] == cells
    assert {"step time, us", "batch size, rows", "length of every row, tokens", "16,384"} <= set(told)
    told = drawn(tmp_path, lambda path: plot_routes(sweep, path))
    routes = [cell["route"] for cell in sweep.cells]
    assert {f"{name} ({routes.count(name)})" for name in routes} <= set(told)
    assert sum(bool(re.fullmatch(r"[+-]\d+%", text)) for text in told) == 6
    paper = step_sweep({"batch": (1, 8), "length": (1024, 65536)}, SHAPE, DEVICE, "paper")
    assert any(text.startswith("flashinfer (") for text in drawn(tmp_path, lambda path: plot_routes(paper, path)))
    for axes in ({"batch": (1, 8, 64)}, {"device": ("rtx3060", "l4")}):
        assert "KV, GB/s" in drawn(tmp_path, lambda path: plot_sweep(step_sweep(axes, SHAPE, DEVICE), "kv_gb_s", path))


def test_colours_and_units() -> None:
    for colours in (PALETTE, list(ROUTE_COLOURS.values()), list(PART_COLOURS.values())):
        assert len(set(colours)) == len(colours)
    looks = {(PALETTE[at % len(PALETTE)], DASHES[at % len(DASHES)]) for at in range(len(POLICIES))}
    assert len(looks) == len(POLICIES) and list(PARTS) == list(PART_COLOURS)
    expected = {
        "us": "step time, us", "ttft_s.p99": "TTFT p99, s", "kv_gb_s": "KV, GB/s", "tokens_per_s": "tokens, 1/s",
        "routes_us.balanced": "routes balanced, us", "kv_occupancy": "KV occupancy", "regret": "regret",
    }  # fmt: skip
    assert {name: unit_of(name) for name in expected} == expected


@settings(max_examples=40, deadline=None)
@given(crowded(), st.integers(1, 50))
def test_series_keep_what_they_sum_up(case, bins) -> None:
    trace, config = case
    result = simulate(trace, MODEL, DEVICE, "calibrated", config)
    steps, edges = result.steps, time_edges([result], bins)
    spent_us = spread(steps, steps.duration_us * steps.steps, edges)
    assert spent_us.sum() == pytest.approx(result.totals["duration_us"])
    widths_us = np.diff(edges) * 1e6
    assert (spent_us >= 0).all() and (spent_us <= widths_us * (1 + 1e-6) + 1e-3).all()
    shares = busy_shares(steps, edges)
    for name, seconds in busy_parts_s(result).items():
        assert (shares[name] * widths_us).sum() / 1e6 == pytest.approx(seconds)
    run = over_time(result, edges)
    assert all(len(values) == bins for values in run.values())
    for values in run.values():
        assert (values[~np.isnan(values)] >= -1e-9).all()
    assert run["running requests"].max() <= config.max_batch * (1 + 1e-9)
    assert run["KV pages in use, %"].max() <= 100 * (1 + 1e-9) and run["GPU busy, %"].max() <= 100 * (1 + 1e-6)


@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(float("nan"))), max_size=60), st.integers(2, 40))
def test_distributions_are_thinned_from_end_to_end(values, points) -> None:
    known = sorted(value for value in values if value == value)
    value, share = distribution(np.array(values, np.float64), points)
    assert len(value) == len(share) <= max(points, 0) and (np.diff(share) > 0).all()
    if known:
        assert (value[0], value[-1], share[-1]) == (known[0], known[-1], 1.0) or len(known) <= points
        for one, at_or_below in zip(value, share):
            assert np.count_nonzero(np.array(known) <= one) >= round(at_or_below * len(known))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["step", "--seq-lens", "8", "--plot", "a.jpg"], "plot: expected a file ending in .png or .svg, got 'a.jpg'"),
        (["step", "--seq-lens", "8", "--plot", "nowhere/a.png"], "plot: cannot write nowhere/a.png: no folder nowhere"),
        (["sweep", "--over", "batch=1", "--plot", "a"], "plot: expected a file ending in"),
        (["sweep", "--over", "batch=1", "--route-map", "a.png"], "route_map: expected two axes and no trace, got bat"),
        (["sweep", *"--over batch=1 --over length=1 --over splits=1 --plot a.png".split()], "plot: expected one or"),
        (["sweep", "--trace", "x", "--over", "rate=1", "--over", "max-batch=1", "--route-map", "a.png"], "of a trace"),
        (["whatif", "--trace", "nowhere.csv", "--plot", "a.gif"], "plot: expected a file ending in"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_work(capsys, monkeypatch, tmp_path, args, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = pkvsim(capsys, monkeypatch, *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = ("step", "--seq-lens", "8", "--device", "h200")
    code, out, err = pkvsim(capsys, monkeypatch, *args, "--plot", str(tmp_path / "a.png"))
    assert (code, out) == (2, "") and "plot: needs matplotlib: pip install matplotlib" in err
    assert pkvsim(capsys, monkeypatch, *args)[0] == 0


def test_matplotlib_is_loaded_for_pictures_alone() -> None:
    reports = ("perfetto", "html_page", "plot_step", "plot_serving", "plot_sweep")
    modules = ("cli", *(f"reports.{name}" for name in reports))
    code = f"import sys, {', '.join(f'pkvsim.{name}' for name in modules)}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=README.parent)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_pictures_from_the_command_line(capsys, monkeypatch, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("requests.csv").write_text(azure_trace(10))
    run = ("whatif", "--trace", "requests.csv", "--device", "h200", "--policies", "balanced", "--plot", "run.svg")
    assert pkvsim(capsys, monkeypatch, *run)[::2] == (0, "")
    sweep = ("sweep", "--trace", "requests.csv", "--device", "h200", "--over", "rate=1,2", "--over", "policy=split,xqa")
    assert pkvsim(capsys, monkeypatch, *sweep, "--metric", "ttft_s.p50", "--plot", "sweep.svg")[::2] == (0, "")
    assert any(text.startswith("attention prices of h200") for text in texts(Path("sweep.svg")))
    assert "TTFT p50, s" in texts(Path("sweep.svg")) and "balanced" in texts(Path("run.svg"))


def test_the_readme_s_pictures(capsys, monkeypatch, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    section = README.read_text().split("\n## Pictures\n", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^    (pkvsim .*)$", section, re.MULTILINE)
    for line in lines:
        assert pkvsim(capsys, monkeypatch, *shlex.split(line, comments=True)[1:])[::2] == (0, "")
    assert len(list(tmp_path.iterdir())) >= len(lines) > 0
