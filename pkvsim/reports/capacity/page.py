"""A capacity search as one self-contained web page, for a reader who was not told what it is."""
from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from pkvsim.reports.capacity.columns import AXIS_HEADS, money, rate, table
from pkvsim.reports.capacity.table import RANK_WORDS
from pkvsim.reports.html_page import DASHES, DIGITS, fill_page, write_page
from pkvsim.reports.plots import colour_of
from pkvsim.reports.table_serving import percent, seconds
from pkvsim.serving.results.summary import SATURATED
from pkvsim.studies.capacity.result import CapacityCell, CapacitySearch
from pkvsim.studies.objectives import METRICS, Objective

SHOWN_AT_FIRST = 8  # More lines than that in one chart cannot be told apart; the others are a click away.
AXIS_WORDS = {
    "device": "the GPU's model",
    "tp": "GPUs that share every layer of the model (tensor parallel); one replica has so many",
    "batch": "most requests that run at once in a replica",
    "policy": "how the kernel of decode attention is chosen",
    "model": "the language model",
    "page_size": "tokens of a page of the KV cache",
    "prefix_cache": "how prompt prefixes are reused",
    "weight_bits": "bits of a layer weight",
    "step_tokens": "most tokens of one step, prompt chunks included",
}


def write_capacity(search: CapacitySearch, path: str | Path) -> None:
    """Writes the page. ValueError as pkvsim.reports.html_page.check_report_path, or where writing fails."""
    write_page(capacity_page(search), path)


def capacity_page(search: CapacitySearch) -> str:
    """The page's text."""
    trace = search.trace
    mean = [f"{tokens.mean():,.0f}" for tokens in (trace.prompt_tokens, trace.output_tokens)]
    names = ", ".join(dict.fromkeys(cell.model for cell in search.cells))
    parts = {
        "title": escape(f"How much traffic can each server take? {names}"),
        "subtitle": escape(
            f"Requests of {trace.name}: {len(trace):,}, on average {mean[0]} prompt and {mean[1]} output tokens"
        ),
        "answer": _answer(search),
        "question": escape(_question(search)),
        "objectives": "".join(f"<li>{escape(_words(one))}</li>" for one in search.objectives),
        "order": escape(RANK_WORDS[search.rank]),
        "table": _table(search),
        "reasons": _reasons(search),
        "glossary": "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _glossary(search)),
        "charts": "".join(
            f'<figure><figcaption>{escape(_caption(one))}</figcaption>'
            f'<div class="chart" id="objective-{at}"></div></figure>'
            for at, one in enumerate(search.objectives)
        ),
        "basis": _basis(search),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in search.notes if not note.startswith("figures stand")),
    }
    return fill_page("capacity", parts, _chart_data(search))


def _answer(search: CapacitySearch) -> str:
    best = search.cells[0]
    if best.capacity is None:
        return "No server keeps the objectives at any rate; the reasons are below."
    one = best.capacity
    text = f"<strong>{escape(best.label)}</strong> comes first: "
    if search.wanted_rate_per_s is not None:
        replicas = "one replica" if one.replicas == 1 else f"{one.replicas:,} replicas"
        gpus = "one GPU" if one.gpus == 1 else f"{one.gpus:,} GPUs in all"
        text += f"{replicas}, {gpus}, for {search.wanted_rate_per_s:g} requests per second"
    else:
        gpus = "one GPU" if one.gpus_per_replica == 1 else f"{one.gpus_per_replica} GPUs"
        text += f"{rate(one.rate_per_s)} requests per second on {gpus}"
    if one.dollars_per_million_tokens is not None:
        text += f", ${money(one.dollars_per_million_tokens)} per million tokens"
    return text + "."


def _question(search: CapacitySearch) -> str:
    wanted = ""
    if search.wanted_rate_per_s is not None:
        wanted = f" Its rate says how many replicas {search.wanted_rate_per_s:g} requests per second need."
    return (
        "For every server the trace's requests were sent faster and slower, in simulation, to find the highest rate "
        f"(to {100 * search.tolerance:g} %) at which it is not saturated and all of the objectives "
        f"below are met.{wanted}"
    )


def _words(one: Objective) -> str:
    share = "every request" if one.percentile == 100 else f"{one.percentile:g} % of the requests"
    return f"{one.name}: {share} with a {METRICS[one.metric]} of at most {seconds(one.bound_s)}"


def _caption(one: Objective) -> str:
    text = METRICS[one.metric]
    return f"{text[0].upper()}{text[1:]}: p{one.percentile:g}"


def _table(search: CapacitySearch) -> str:
    heads, rows = table(search)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    words = {at for at, name in enumerate(search.axes) if name in ("device", "model", "policy", "prefix_cache")}
    lines = []
    for place, (cell, row) in enumerate(zip(search.cells, rows), 1):
        cells = "".join(
            f'<td class="word">{escape(text)}</td>' if at in words else f"<td>{escape(text)}</td>"
            for at, text in enumerate(row)
        )
        empty = ' class="empty"' if cell.capacity is None else ""
        lines.append(f'<tr{empty}><th scope="row">{place if cell.capacity else "-"}</th>{cells}</tr>')
    return f'<table id="capacity"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _reasons(search: CapacitySearch) -> str:
    empty = [cell for cell in search.cells if cell.capacity is None]
    if not empty:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(cell.label)}</th><td class="words">{escape(cell.reason)}</td></tr>'
        for cell in empty
    )
    return f'<h2>Why some have no figures</h2><table id="reasons"><tbody>{rows}</tbody></table>'


def _glossary(search: CapacitySearch) -> list[tuple[str, str]]:
    terms = [(AXIS_HEADS[name].replace("\n", " "), AXIS_WORDS[name]) for name in search.axes]
    terms.append(("requests/s per replica", "the highest rate that one replica keeps; the figures after it are there"))
    if search.wanted_rate_per_s is not None:
        terms.append(("replicas, GPUs", f"that {search.wanted_rate_per_s:g} requests per second need together"))
    terms.append(("output tokens/s", "that requests at this rate ask of one replica"))
    for one in search.objectives:
        terms.append((one.name, f"{METRICS[one.metric]}: {one.percentile:g} % of the requests had at most this"))
    terms += [
        ("good requests", "those that keep every bound by themselves"),
        (
            "missed just above",
            f"objectives that a rate higher by at most {100 * search.tolerance:g} % misses; saturated: {SATURATED}",
        ),
    ]
    if search.prices:
        serve = "the wanted rate" if search.wanted_rate_per_s is not None else "their highest rate"
        given = ", ".join(f"{name} {money(dollars)}" for name, dollars in search.prices.items())
        terms.append((
            "$ per hour, M output, M tokens",
            f"from the prices given for a GPU and hour ({given}): all GPUs; a million output tokens; a million "
            f"prompt and output tokens, while they serve {serve}",
        ))  # fmt: skip
    return terms


def _basis(search: CapacitySearch) -> str:
    """Equal rows of all servers together, with the least and the greatest share of the time."""
    rows: dict[tuple[str, str, str, float | None], list[tuple[CapacityCell, float | None]]] = {}
    cells = [cell for cell in search.cells if cell.basis]
    for cell in cells:
        for row in cell.basis:
            rows.setdefault((row.quantity, row.basis, row.source, row.error_percent), []).append((cell, row.time_share))
    lines = []
    # Rows of one quantity stand together, in the order of the first server.
    order = list(dict.fromkeys(key[0] for key in rows))
    for key in sorted(rows, key=lambda key: order.index(key[0])):
        quantity, basis, source, error = key
        shares = [share for _, share in rows[key] if share is not None]
        span = "" if not shares else percent(min(shares))
        if shares and percent(max(shares)) != span:
            span += f" to {percent(max(shares))}"
        who = _who([cell for cell, _ in rows[key]], cells)
        texts = (basis, source, "" if error is None else f"{error:.1f} %", span, who)
        columns = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f'<tr><th scope="row">{escape(quantity)}</th>{columns}</tr>')
    heads = ("", "basis", "source", "error", "share of time", "servers")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return f'<table id="basis"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _who(some: list[CapacityCell], cells: list[CapacityCell]) -> str:
    """Some of the cells, by their devices where it is all of those devices."""
    if len(some) == len(cells):
        return "all"
    devices = list(dict.fromkeys(cell.device for cell in some))
    if len(some) == sum(cell.device in devices for cell in cells):
        return ", ".join(devices)
    return "; ".join(cell.label for cell in some)


def _chart_data(search: CapacitySearch) -> dict[str, Any]:
    """What the page's script draws: rates in requests per second, times in seconds."""
    tried = [cell for cell in search.cells if cell.points]
    return {
        "shown_at_first": SHOWN_AT_FIRST,
        "objectives": [
            {"id": f"objective-{at}", "name": one.name, "bound_s": one.bound_s, "text": str(one).replace("=", " <= ")}
            for at, one in enumerate(search.objectives)
        ],
        "servers": [
            {
                "name": cell.label, "colour": colour_of(at), "dash": DASHES[at % len(DASHES)],
                "rates": [_number(point.rate_per_s) for point in cell.points],
                "kept": [point.kept for point in cell.points],
                "values_s": {
                    one.name: [_number(point.outcomes[place].value_s) for point in cell.points]
                    for place, one in enumerate(search.objectives)
                },
            }
            for at, cell in enumerate(tried)
        ],
    }  # fmt: skip


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
