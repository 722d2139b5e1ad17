"""The figures that every table shows of a server."""
from __future__ import annotations

from pkvsim.reports.table_serving import digits, percent, seconds
from pkvsim.studies.capacity.result import Capacity, CapacityCell, CapacitySearch

AXIS_HEADS = {
    "device": "GPU", "tp": "GPUs per\nreplica", "batch": "most\nrunning", "policy": "policy", "model": "model",
    "page_size": "page\nsize", "prefix_cache": "prefix\ncache", "weight_bits": "weight\nbits",
    "step_tokens": "tokens\nper step",
}  # fmt: skip
NONE = "-"


def table(search: CapacitySearch) -> tuple[list[str], list[list[str]]]:
    """(heads, whose lines are split by newlines, and a row of texts for every server, best first)."""
    wanted, priced = search.wanted_rate_per_s is not None, bool(search.prices)
    heads = [*(AXIS_HEADS[name] for name in search.axes), "requests/s\nper replica"]
    heads += ["replicas", "GPUs"] if wanted else []
    heads += ["output\ntokens/s"]
    heads += [f"{one.name}\nof {seconds(one.bound_s)}" for one in search.objectives]
    heads += ["good\nrequests", "missed\njust above"]
    heads += ["$ per\nhour", "$ per M\noutput", "$ per M\ntokens"] if priced else []
    return heads, [_row(search, cell, wanted, priced) for cell in search.cells]


def _row(search: CapacitySearch, cell: CapacityCell, wanted: bool, priced: bool) -> list[str]:
    row = [str(value) for value in cell.place.values()]
    one = cell.capacity
    if one is None:
        return row + [NONE] * (4 + len(search.objectives) + 2 * wanted + 3 * priced)
    row += [rate(one.rate_per_s)] + ([f"{one.replicas:,}", f"{one.gpus:,}"] if wanted else [])
    row += [rate(one.output_tokens_per_s)]
    row += [seconds(outcome.value_s) or NONE for outcome in one.outcomes]
    row += [percent(one.goodput.request_share), limit(one)]
    if priced:
        row += [money(one.dollars_per_hour), money(one.dollars_per_million_output_tokens)]
        row += [money(one.dollars_per_million_tokens)]
    return row


def rate(per_s: float) -> str:
    """Three digits."""
    return digits(per_s, 3)


def money(dollars: float | None) -> str:
    """Cents, or three digits of what is less than a dollar; a dash where the caller gave no price."""
    if dollars is None:
        return NONE
    return f"{dollars:,.2f}" if dollars >= 1 else f"{dollars:#.3g}"


def limit(one: Capacity) -> str:
    """What a rate just above misses."""
    return "nothing tried" if one.missed_rate_per_s is None else ", ".join(one.missed)
