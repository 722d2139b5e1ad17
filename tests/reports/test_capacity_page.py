"""The page of a capacity search: self-contained, its table the search's; in headless Chromium where there is one."""
from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from serving_cases import poisson_trace

from pkvsim.reports.capacity.columns import table
from pkvsim.reports.capacity.page import capacity_page, write_capacity
from pkvsim.studies.capacity.result import CapacitySearch
from pkvsim.studies.capacity.search import capacity_search
from pkvsim.studies.objectives import parse_objectives

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TRACE = poisson_trace(60, 4, 900, 30, seed=3)


@pytest.fixture(scope="module")
def search() -> CapacitySearch:
    return capacity_search(
        {"device": ("l4", "h200"), "tp": (1, 3)}, TRACE, parse_objectives("ttft_p90=3s,tpot_p90=150ms"),
        wanted_rate_per_s=100, prices={"l4": 0.8, "h200": 3.5}, tolerance=0.1, curve=True,
    )  # fmt: skip


class Text(HTMLParser):
    """What is to be read without scripts, and the addresses that the page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.told: list[str] = []
        self.addresses: list[str | None] = []
        self.hidden = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag) -> None:
        self.hidden = False

    def handle_data(self, text) -> None:
        if not self.hidden:
            self.told.append(text)


def test_the_page_is_whole_and_alone(search) -> None:
    page = capacity_page(search)
    text = Text(page)
    read = " ".join("".join(text.told).split())
    assert text.addresses == ["data:,"] and "default-src 'none'" in page
    assert page == capacity_page(search) and not re.search(r"\$[a-z]", re.sub(r"\$\{", "", page))
    best = search.cells[0].capacity
    assert f"{search.cells[0].label} comes first: " in read and f"{best.replicas} replicas" in read
    assert "ttft_p90: 90 % of the requests with a time to first token of at most 3 s" in read
    assert "expected a divisor of llama-3.1-8b's 32 query heads, got 3" in read
    for row in table(search)[1]:
        assert all(cell in read for cell in row)


def test_names_cannot_write_html(search) -> None:
    from dataclasses import replace

    bad = "</script><b>&\"x"
    cells = tuple(replace(cell, place=cell.place | {"device": bad}) for cell in search.cells)
    page = capacity_page(replace(search, cells=cells, trace=replace(search.trace, name=bad), notes=(bad,)))
    assert "<b>" not in page and "</script><" not in page.replace("</script>\n<", "")


def test_nothing_that_is_kept_still_makes_a_page() -> None:
    none = capacity_search({"device": ("l4",)}, TRACE, parse_objectives("e2e_p100=1us"))
    text = "".join(Text(capacity_page(none)).told)
    assert "No server keeps the objectives at any rate" in text and "even at" in text


@pytest.fixture(scope="module")
def browser():
    """Chromium: Playwright's own, or one on PATH; without its sandbox, as root cannot start it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install '.[test]'")
    with playwright.sync_playwright() as driver:
        for path in [None, *filter(None, map(shutil.which, BROWSERS))]:
            try:
                chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
                break
            except playwright.Error:
                continue
        else:
            pytest.skip(f"no browser starts: `playwright install chromium`, or one of {', '.join(BROWSERS)} on PATH")
        yield chromium
        chromium.close()


def test_in_a_browser(browser, search, tmp_path) -> None:
    write_capacity(search, tmp_path / "page.html")
    address = (tmp_path / "page.html").as_uri()
    told: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: told.append(request.url) if request.url != address else None)
    tab.goto(address)
    rows = tab.eval_on_selector_all(
        "#capacity tbody tr", "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.textContent))"
    )
    assert rows == table(search)[1]
    servers = [cell.label for cell in search.cells if cell.points]
    lines = "lines => lines.map(line => line.dataset.name)"
    for chart in ("objective-0", "objective-1"):
        assert tab.eval_on_selector_all(f"#{chart} .line", lines) == servers
        assert tab.eval_on_selector_all(f"#{chart} line.bound", "all => all.length") == 1
    assert tab.text_content("#objective-0 text.bound") == "objective: ttft_p90 <= 3s"
    data = json.loads(tab.text_content("#data"))
    assert [server["rates"] for server in data["servers"]] == [
        [float(f"{point.rate_per_s:.5g}") for point in cell.points] for cell in search.cells if cell.points
    ]
    tab.locator("#objective-0 svg").hover()
    assert tab.is_visible("#tip") and [name in tab.inner_text("#tip") for name in servers] == [True, True]
    tab.click(f"#servers button[data-name='{servers[0]}']")
    assert tab.eval_on_selector_all("#objective-1 .line", lines) == servers[1:]
    tab.click(f"#servers button[data-name='{servers[1]}']")
    assert tab.inner_text("#objective-1") == "No server is shown."
    assert "NaN" not in tab.inner_html("main") and "undefined" not in tab.inner_html("main")
    tab.close()
    assert told == []
