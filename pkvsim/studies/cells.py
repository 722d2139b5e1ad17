"""The cells of a study over axes: NAME=VALUE,VALUE,... read, every combination, and notes by the cells they hold of."""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WORDS = (
    "device", "model", "policy", "prefix_cache", "order", "router", "engine", "tiers", "placement", "retention",
    "tier_admission", "load_or_recompute", "serial_reads", "shared_reads", "select",
)  # axes whose values are names  # fmt: skip
FRACTIONS = ("rate", "host_link", "tier_hold_cost")  # axes whose values need be no integers
Place = dict[str, Any]  # a value for every axis


def parse_axes(texts: Sequence[str], known: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`name=value,value,...` each; ValueError naming the axis and what was expected."""
    axes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ValueError(f"over: expected NAME=VALUE,VALUE,... with a name of {', '.join(known)}, got {text!r}")
        if name in axes:
            raise ValueError(f"over: expected each name once, got {name} twice")
        axes[name] = tuple(_value(name, part.strip()) for part in values.split(","))
        if len(set(axes[name])) < len(axes[name]):
            raise ValueError(f"over: {name}: expected each value once, got {values}")
    if not axes:
        raise ValueError("over: expected at least one axis")
    return axes


def _value(name: str, text: str) -> Any:
    if name in WORDS:
        if not text:
            raise ValueError(f"over: {name}: expected names, got an empty one")
        return text
    try:
        number = float(text) if name in FRACTIONS else int(text)
    except ValueError:
        kind = "numbers" if name in FRACTIONS else "integers"
        raise ValueError(f"over: {name}: expected {kind}, got {text!r}") from None
    if not 0 < number < np.inf:
        raise ValueError(f"over: {name}: expected numbers > 0, got {text}")
    return number


def switch(name: str, text: str) -> bool:
    """Of an axis whose values are on and off. ValueError naming it."""
    if text not in ("on", "off"):
        raise ValueError(f"axes: {name}: expected on or off, got {text!r}")
    return text == "on"


def check_axes(axes: Mapping[str, Sequence[Any]], known: Sequence[str]) -> None:
    """ValueError where an axis has no values, or a name that is not known."""
    for name, values in axes.items():
        if name not in known or not len(values):
            raise ValueError(f"axes: expected values for names of {', '.join(known)}, got {name}={list(values)}")
    if not axes:
        raise ValueError("axes: expected at least one")


def places(axes: Mapping[str, Sequence[Any]]) -> list[Place]:
    """Every combination, the last axis changing fastest."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


class CellNotes:
    """Notes by the cells of which they hold."""

    NAMED = 3  # cells

    def __init__(self, num_cells: int) -> None:
        self._num_cells = num_cells
        self._places: dict[str, list[Place]] = {}

    def add(self, place: Place, notes: Sequence[str]) -> None:
        """What must be known of one cell."""
        for note in notes:
            self._places.setdefault(note, []).append(place)

    def lines(self) -> tuple[str, ...]:
        """Each note once; what does not hold of all cells names the first of which it does."""
        return tuple(note + self._of(where) for note, where in self._places.items())

    def _of(self, where: list[Place]) -> str:
        if len(where) == self._num_cells:
            return ""
        named = ["(" + ", ".join(f"{name}={value}" for name, value in place.items()) + ")" for place in where]
        more = f" and {len(named) - self.NAMED} more" if len(named) > self.NAMED else ""
        return f" -- {' '.join(named[: self.NAMED])}{more}"
