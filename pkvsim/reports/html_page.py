"""A whatif as one self-contained web page: tables, and charts drawn by the page's own script. No file or address
outside it is needed; its Content-Security-Policy allows none."""
from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from pkvsim.reports.plots import PART_COLOURS, ROUTE_COLOURS, check_folder, colour_of
from pkvsim.reports.table_serving import BASIS_COLUMNS, basis_rows, seconds, table_rows
from pkvsim.studies.series import PARTS, busy_parts_s, distribution, is_wide, over_time, time_edges
from pkvsim.studies.sweep import figures
from pkvsim.studies.whatif import WhatIf

DASHES = ("none", "6 3", "2 2", "8 3 2 3", "4 2 1 2 1 2")  # Policies take these dashes of lines in order.
CURVE_POINTS = 400  # A latency distribution is drawn through so many points.
RUN_BINS = 240  # A run is cut into so many bins of time.
DIGITS = 5  # A chart's numbers keep so many digits; the tables keep all.


def check_report_path(path: str | Path) -> Path:
    """`path`, if a page can be written there; ValueError otherwise. Long work asks before it starts."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: expected a file ending in .html, got {str(path)!r}")
    check_folder(path, option="report")
    return Path(path)


def write_html(report: WhatIf, path: str | Path) -> None:
    """Writes the page. ValueError as check_report_path, or where writing fails."""
    write_page(html_page(report), path)


def write_page(text: str, path: str | Path) -> None:
    """Writes any page. ValueError as check_report_path, or where writing fails."""
    path = check_report_path(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"report: cannot write {path}: {error.strerror or error}") from None


def html_page(report: WhatIf) -> str:
    """The page's text."""
    trace, first = report.trace, next(iter(report.results.values()))
    parts = {
        "title": escape(f"{report.model.name} on {report.device.label}"),
        "subtitle": escape(
            f"{trace.name}: {len(trace):,} requests in {seconds(trace.duration_s) or '0 s'}, "
            f"{int(trace.output_tokens.sum()):,} output tokens; "
            f"{first.num_pages:,} KV pages of {first.page_size} tokens"
        ),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in report.notes),
        "summary": _table(list(report.results), table_rows(report)),
        "figures": _figures(report),
        "config": _config(report),
        "basis": _basis(report),
    }
    return fill_page("page", parts, _chart_data(report))


def fill_page(name: str, parts: dict[str, str], data: dict[str, Any]) -> str:
    """The text of NAME.html of reports/page, with HTML for its placeholders, the style that pages share, and the shared
    script and NAME.js, which draw `data`."""
    page = files("pkvsim") / "reports" / "page"

    def read(file: str) -> str:
        return (page / file).read_text(encoding="utf-8")

    # "<" is written as JSON's escape, so that no name in the data can end the script element.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script = read("charts.js") + read(f"{name}.js")
    return Template(read(f"{name}.html")).substitute(parts, style=read("page.css"), script=script, data=text)


def _table(policies: list[str], rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th scope="col" data-column="{escape(name)}">{escape(name)}</th>' for name in policies)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f'<td data-column="{escape(name)}">{escape(text)}</td>' for name, text in zip(policies, cells))
        + "</tr>"
        for label, cells in rows
    )
    return f'<table id="summary"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _figures(report: WhatIf) -> str:
    """Every number of the JSON's policies at full precision, a row a dotted name."""
    policies = report.to_dict()["policies"]
    names = list(dict.fromkeys(name for summary in policies.values() for name in figures(summary)))
    head = "".join(f'<th scope="col" data-column="{escape(name)}">{escape(name)}</th>' for name in policies)
    rows = []
    for name in names:
        cells = (
            f'<td data-column="{escape(policy)}" data-figure="{escape(name)}">{_exact(summary, name)}</td>'
            for policy, summary in policies.items()
        )
        rows.append(f'<tr><th scope="row"><code>{escape(name)}</code></th>{"".join(cells)}</tr>')
    return f'<table id="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _exact(summary: dict[str, Any], name: str) -> str:
    """A figure as JSON writes it; empty where this policy has none, such as a route that it never takes."""
    value: Any = summary
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return ""
        value = value[part]
    return escape(json.dumps(value))


def _config(report: WhatIf) -> str:
    told = report.to_dict()
    rows = {"model": told["model"], "device": told["device"], "accuracy": told["accuracy"]} | told["config"]
    texts = {name: "-" if value is None else str(value) for name, value in rows.items()}
    cells = {escape(name): escape(text) for name, text in texts.items()}
    body = "".join(f'<tr><th scope="row">{name}</th><td class="words">{text}</td></tr>' for name, text in cells.items())
    return f'<table id="config"><tbody>{body}</tbody></table>'


def _basis(report: WhatIf) -> str:
    """What every figure stands on; --json says where it comes from, as a page names no address."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (column.head for column in BASIS_COLUMNS))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in basis_rows(report.basis)
    )
    return f'<table id="basis"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _chart_data(report: WhatIf) -> dict[str, Any]:
    """What the page's script draws: times in seconds, shares in percent."""
    results = report.results
    edges = time_edges(list(results.values()), RUN_BINS)
    runs = {
        name: {metric: _numbers(values) for metric, values in over_time(result, edges).items()}
        for name, result in results.items()
    }

    def curves(field: str) -> dict[str, Any]:
        values = {name: distribution(getattr(run.requests, field), CURVE_POINTS) for name, run in results.items()}
        lines = {name: [_numbers(value), _numbers(share * 100)] for name, (value, share) in values.items()}
        return {"log": is_wide(value for value, _ in values.values()), "lines": lines}

    return {
        "policies": [
            {"name": name, "colour": colour_of(at), "dash": DASHES[at % len(DASHES)]} for at, name in enumerate(results)
        ],
        "ttft_s": curves("ttft_s"),
        "tpot_s": curves("tpot_s"),
        "parts_s": {name: busy_parts_s(result) for name, result in results.items()},
        "part_colours": {name: PART_COLOURS[name] for name in PARTS},
        "routes": {name: result.summary["routes"] for name, result in results.items()},
        "route_colours": ROUTE_COLOURS,
        "run": {
            "metrics": list(next(iter(runs.values()))),
            "edges_s": _numbers(edges),
            "figures": runs,
        },
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """DIGITS significant digits, as many as a chart shows; NaN becomes None."""
    return [None if np.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values.tolist()]
