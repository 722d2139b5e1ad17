"""The documentation's tables are those of the code: JSON keys, device files, options, the feature table's tests."""
from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
from command import azure_trace, pkvsim
from paths import ROOT
from trace_writers import mooncake

from pkvsim.devices.device import NUMBER_FIELDS
from pkvsim.devices.route_model import ROUTES, RULES, CalibratedRoute, FitError, RouteModel
from pkvsim.policy.by_name import POLICIES

DOCS = ROOT / "docs"


def rows(page: str, section: str) -> list[list[str]]:
    """The cells of the first table below a heading, its head and rule left out."""
    text = (DOCS / page).read_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def first_cells(page: str, section: str) -> set[str]:
    return {cell for row in rows(page, section) for cell in re.findall(r"`([^`]+)`", row[0])}


def paths(value: object, names: dict[str, str], where: str = "") -> set[str]:
    """Every key of a JSON document as a dotted path. [] stands for any element of an array of objects; a key that is a
    name, such as a route's, for what `names` says of the objects below that path."""
    if isinstance(value, dict):
        placeholder = names.get(where)
        found = set()
        for key, inner in value.items():
            at = f"{where}.{placeholder or key}" if where else placeholder or key
            found |= paths(inner, names, at)
        return found or {where}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(inner, names, f"{where}[]") for inner in value))
    return {where}
