"""The page of a whatif: self-contained, its numbers those of the JSON; in headless Chromium where there is one."""
from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import azure_trace, pkvsim
from serving_cases import DEVICE, MODEL, make_trace, poisson_trace

from pkvsim.reports.html_page import html_page, write_html
from pkvsim.reports.table_serving import table_rows
from pkvsim.serving.server_config import ServingConfig
from pkvsim.studies.sweep import figures
from pkvsim.studies.whatif import WhatIf, whatif

POLICIES = ["paper", "calibrated", "flashinfer", "workqueue", "balanced", "oracle"]
VOID = {"meta", "link", "br", "input", "hr", "img"}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def report() -> WhatIf:
    return whatif(poisson_trace(150, 6, 4000, 60, seed=5), MODEL, DEVICE, POLICIES)


@pytest.fixture(scope="module")
def page_file(report, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(report, path)
    return path


class Page(HTMLParser):
    """Tags that close in order, table cells by (table, data-figure, data-column), and the JSON of the charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: dict[tuple[str, str | None, str], list[str]] = {}
        self.data = self.table = ""
        self.cell: list[str] | None = None
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.attributes += attrs
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(f"{tag}#{given.get('id', '')}")
        if tag == "table":
            self.table = given["id"]
        if tag == "td" and "data-column" in given:
            self.cell = []
            self.cells.setdefault((self.table, given.get("data-figure"), given["data-column"]), self.cell)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop().startswith(f"{tag}#"), tag
        if tag == "td":
            self.cell = None

    def handle_data(self, text) -> None:
        if self.cell is not None:
            self.cell.append(text)
        if self.open and self.open[-1] == "script#data":
            self.data += text


def figure_of(summary: dict, name: str):
    for part in name.split("."):
        summary = summary.get(part, {}) if summary else None
    return None if summary == {} else summary


def test_the_page_is_whole_and_alone(report) -> None:
    text = html_page(report)
    page = Page(text)
    code = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)  # without the script's comments
    assert "http:" not in text and "https:" not in text and "//" not in code
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset") and value != "data:,"]
    assert "$" not in re.sub(r"\$\{", "", text)  # nothing of the template is left
    assert html_page(report) == text and len(text) < 400_000


def test_the_numbers_are_the_json_s(report) -> None:
    page, told = Page(html_page(report)), report.to_dict()["policies"]
    exact = {(name, policy): "".join(text) for (table, name, policy), text in page.cells.items() if table == "figures"}
    assert {policy for _, policy in exact} == set(POLICIES)
    for policy, summary in told.items():
        assert set(figures(summary)) <= {name for name, _ in exact}
        for name in {name for name, _ in exact}:
            text = exact[name, policy]
            assert (json.loads(text) if text else None) == figure_of(summary, name), (name, policy)
    data = json.loads(page.data)
    assert [policy["name"] for policy in data["policies"]] == POLICIES == list(data["ttft_s"]["lines"])
    for policy, (values, shares) in data["ttft_s"]["lines"].items():
        assert values == sorted(values) and shares == sorted(shares) and shares[-1] == 100
        median = min(value for value, share in zip(values, shares) if share >= 50)
        assert median == pytest.approx(told[policy]["ttft_s"]["p50"], rel=0.02)
    for policy, parts in data["parts_s"].items():
        busy_s = told[policy]["busy_share"] * told[policy]["makespan_s"]
        assert sum(parts.values()) == pytest.approx(busy_s)
        assert parts["decode attention"] == pytest.approx(busy_s * told[policy]["attention_share"])
        assert data["routes"][policy] == told[policy]["routes"]
        run, edges = data["run"]["figures"][policy], data["run"]["edges_s"]
        assert len(edges) == 1 + len(run["GPU busy, %"])
        spent = sum(busy / 100 * (end - begin) for busy, begin, end in zip(run["GPU busy, %"], edges, edges[1:]))
        assert spent == pytest.approx(busy_s, rel=1e-2)


def test_names_cannot_write_html(report) -> None:
    trace = make_trace([(0.1, 300, 5)] * 4)
    object.__setattr__(trace, "name", "</script><b>&\"x")
    text = html_page(whatif(trace, MODEL, DEVICE, ["balanced"]))
    Page(text)
    assert "<b>" not in text and "&lt;/script&gt;&lt;b&gt;&amp;" in text


def test_a_page_from_the_command_line(capsys, monkeypatch, tmp_path) -> None:
    trace, path = tmp_path / "requests.csv", tmp_path / "page.html"
    trace.write_text(azure_trace(12))
    args = ("whatif", "--trace", str(trace), "--device", "h200", "--policies", "balanced,split")
    assert pkvsim(capsys, monkeypatch, *args, "--report", str(path))[::2] == (0, "")
    assert set(json.loads(Page(path.read_text()).data)["parts_s"]) == {"balanced", "split"}
    for name, message in (("page.pdf", "report: expected a file ending in .html"), ("no/a.html", "cannot write")):
        code, out, err = pkvsim(capsys, monkeypatch, *args, "--report", str(tmp_path / name))
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def browser():
    """Chromium: Playwright's own, or one on PATH; without its sandbox, as root cannot start it: it sees our page
    only."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install '.[test]'")
    with playwright.sync_playwright() as driver:
        paths = [None, *filter(None, map(shutil.which, BROWSERS))]
        for path in paths:
            try:
                chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
                break
            except playwright.Error:
                continue
        else:
            pytest.skip(f"no browser starts: `playwright install chromium`, or one of {', '.join(BROWSERS)} on PATH")
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, page_file):
    """The page in a tab. What the console says, and every request but the page itself, fails the test."""
    told: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    tab = context.new_page()
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: told.append(request.url) if request.url != page_file.as_uri() else None)
    tab.goto(page_file.as_uri())
    yield tab
    context.close()
    assert told == []


def test_the_tables_in_a_browser(tab, report) -> None:
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    rows = tab.eval_on_selector_all("#summary tbody tr", cells)
    assert rows == [[label, *cells] for label, cells in table_rows(report)]
    shown = tab.eval_on_selector_all(
        "#figures td", "cells => cells.map(c => [c.dataset.column, c.dataset.figure, c.textContent])"
    )
    told = report.to_dict()["policies"]
    assert len(shown) == len({(policy, name) for policy, name, _ in shown}) > 200
    for policy, name, text in shown:
        assert (json.loads(text) if text else None) == figure_of(told[policy], name)


def lines_of(tab, chart: str) -> list[str]:
    return tab.eval_on_selector_all(f"#{chart} .line", "lines => lines.map(line => line.dataset.name)")


def test_the_toggles(tab) -> None:
    buttons = tab.eval_on_selector_all("#policies button", "all => all.map(button => button.dataset.name)")
    assert buttons == POLICIES == lines_of(tab, "ttft") == lines_of(tab, "tpot") == lines_of(tab, "run")
    tab.click("#policies button[data-name=paper]")
    assert tab.get_attribute("#policies button[data-name=paper]", "aria-pressed") == "false"
    for chart in ("ttft", "tpot", "run"):
        assert lines_of(tab, chart) == POLICIES[1:]
    for chart in ("parts", "routes"):
        bars = tab.eval_on_selector_all(f"#{chart} .bar", "bars => bars.map(bar => bar.dataset.name)")
        assert set(bars) == set(POLICIES[1:])
    for table in ("summary", "figures"):
        cells = "all => all.map(cell => [cell.dataset.column, cell.hidden])"
        hidden = tab.eval_on_selector_all(f"#{table} [data-column]", cells)
        assert {policy for policy, is_hidden in hidden if is_hidden} == {"paper"}
        assert {policy for policy, is_hidden in hidden if not is_hidden} == set(POLICIES[1:])
    for policy in POLICIES[1:]:
        tab.click(f"#policies button[data-name={policy}]")
    assert lines_of(tab, "run") == [] and tab.inner_text("#ttft") != ""
    tab.focus("#policies button[data-name=oracle]")
    tab.keyboard.press("Enter")
    assert lines_of(tab, "run") == ["oracle"]


def test_the_values_under_the_pointer(tab, report) -> None:
    box = tab.locator("#ttft svg").bounding_box()
    height, top, bottom = 270, 8, 40  # the chart's own units, as in charts.js
    scale = box["height"] / height
    tab.locator("#ttft svg").hover(position={"x": box["width"] / 2, "y": (top + (height - top - bottom) / 2) * scale})
    text = tab.inner_text("#tip")
    assert tab.is_visible("#tip") and [line.split()[0] for line in text.splitlines()[1:]] == POLICIES
    share = float(text.split(" %")[0])
    assert share == pytest.approx(50, abs=1)
    value, unit = text.splitlines()[1].split()[1:]
    expected = report.results["paper"].summary["ttft_s"]["p50"]
    assert float(value) * {"us": 1e-6, "ms": 1e-3, "s": 1}[unit] == pytest.approx(expected, rel=0.1)
    for metric in tab.eval_on_selector_all("#metric option", "all => all.map(option => option.value)"):
        tab.select_option("#metric", metric)
        assert tab.get_attribute("#run svg", "aria-label").startswith(metric)
        assert "NaN" not in tab.inner_html("#run")
    tab.locator("#run svg").hover()
    assert len(tab.inner_text("#tip").splitlines()) == 1 + len(POLICIES)
    tab.locator("#parts .bar").first.hover()
    assert tab.inner_text("#tip").startswith("paper, decode attention\n")
    tab.mouse.move(2, 2)
    assert tab.is_hidden("#tip")
    assert "NaN" not in tab.inner_html("main") and "undefined" not in tab.inner_html("main")


@pytest.mark.parametrize("rows", [[(0, 10, 1)], [(0, 10**6, 4), (1, 10, 1)], [(0, 10, 2)]])
def test_runs_with_little_in_them(browser, tmp_path, rows) -> None:
    told: list[str] = []
    write_html(whatif(make_trace(rows), MODEL, DEVICE, ["balanced"], ServingConfig(kv_gib=1)), tmp_path / "page.html")
    Page((tmp_path / "page.html").read_text())
    tab = browser.new_page()
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.goto((tmp_path / "page.html").as_uri())
    assert "NaN" not in tab.inner_html("main") and lines_of(tab, "ttft") == ["balanced"]
    assert lines_of(tab, "tpot") == ([] if rows[-1][2] == 1 else ["balanced"])
    tab.close()
    assert told == []
