"""How a server's steps select pages, as one value: the words METHOD:BUDGET of the commands."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pkvsim.selection.by_name import BY_SUMMARIES, method
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.summaries import SUMMARIES
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int

OFF = "off"
SUMMARY_ELEMENT_BYTES = 2  # of a summary in 16 bits
SUMMARY_VECTORS = 2  # mean and standard deviation, or minimum and maximum


@dataclass(frozen=True, slots=True)
class SelectionSetup:
    """Which pages steps read. Raises ValueError naming the field.

    every: layers that read one layer's lists, that layer included (Kascade's anchor layers); 1: each layer has lists of
    its own. dense_layers: the first ones of those that could select, which read all pages.
    """

    method: str = "mean_std"
    budget: Budget = Budget()  # noqa: RUF009
    pins: Pins = Pins()  # noqa: RUF009
    every: int = 1
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if method(self.method).SUMMARY not in SUMMARIES:
            raise ValueError(f"method: expected one that scores summaries, got {self.method}")
        check_int("every", self.every, 1, MAX_TOKENS)
        check_int("dense_layers", self.dense_layers, 0, MAX_TOKENS)

    @property
    def words(self) -> str:
        """As parse_selection reads it."""
        return f"{self.method}:{self.budget.fraction:g}"

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "method": self.method, "budget": self.budget.fraction, "least_pages": self.budget.least_pages,
            "sink_pages": self.pins.sink_pages, "recent_pages": self.pins.recent_pages, "every": self.every,
            "dense_layers": self.dense_layers,
        }  # fmt: skip


def parse_selection(text: str, *, every: int = 1, dense_layers: int = 2) -> SelectionSetup | None:
    """`mean_std:0.1`: the method, and the part of a row's pages that each KV head reads; None of `off`. ValueError
    naming select."""
    if text.strip() == OFF:
        return None
    name, colon, budget = text.strip().partition(":")
    if name not in BY_SUMMARIES or not colon:
        names = " or ".join(BY_SUMMARIES)
        raise ValueError(f"select: expected METHOD:BUDGET with a method of {names}, or {OFF}, got {text!r}")
    try:
        part = float(budget)
    except ValueError:
        raise ValueError(f"select: expected METHOD:BUDGET with a number in (0, 1], got {text!r}") from None
    try:
        found = Budget(part)
    except ValueError as error:
        raise ValueError(f"select: {error}") from None
    return SelectionSetup(name, found, every=check_int("select_every", every, 1, MAX_TOKENS), dense_layers=dense_layers)


def summary_bytes(shape: DecodeShape) -> int:
    """Bytes of one page's summary over the KV heads of a layer."""
    return shape.num_kv_heads * SUMMARY_VECTORS * shape.head_dim * SUMMARY_ELEMENT_BYTES
