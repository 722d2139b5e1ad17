"""How a server's steps select pages, as one value: the words METHOD:BUDGET of the commands."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pkvsim.compiled import compiled, drop_stale
from pkvsim.selection.by_name import BY_SUMMARIES, method
from pkvsim.selection.centroids import CENTROIDS, ELEMENTS_PER_BYTE, PARTS
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.summaries import CODES, check_form
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int

OFF = "off"
CODED_WORD = "8bit"  # of METHOD:BUDGET:8bit
SUMMARY_VECTORS = 2  # mean and standard deviation, or minimum and maximum
ELEMENT_BYTES, CODE_BYTES, CODE_SCALE_BYTES = 2, 1, 4  # of an element in 16 bits, of one in a code; of a coded vector
CENTROID_SCALE_BYTES = 4  # of a centroid, whose scale and count are of 16 bits
IN_16_BITS, IN_CODES, IN_CENTROIDS = 0, 1, 2  # forms of summaries


@dataclass(frozen=True, slots=True)
class SelectionSetup:
    """Which pages steps read. Raises ValueError naming the field.

    every: layers that read one layer's lists, that layer included (Kascade's anchor layers); 1: each layer has lists of
    its own. dense_layers: the first ones of those that could select, which read all pages. summary_dtype: None, for
    that of the pages in 16 bits, or "uint8", for codes with a scale for each vector.
    """

    method: str = "mean_std"
    budget: Budget = Budget()  # noqa: RUF009
    pins: Pins = Pins()  # noqa: RUF009
    every: int = 1
    dense_layers: int = 2
    summary_dtype: str | None = None

    def __post_init__(self) -> None:
        check_form(method(self.method).SUMMARY, self.summary_dtype)
        for name, kind in (("budget", Budget), ("pins", Pins)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {getattr(self, name)!r}")
        check_int("every", self.every, 1, MAX_TOKENS)
        check_int("dense_layers", self.dense_layers, 0, MAX_TOKENS)

    @property
    def form(self) -> int:
        """In which form summaries are kept: IN_16_BITS, IN_CODES or IN_CENTROIDS."""
        if method(self.method).SUMMARY == CENTROIDS:
            return IN_CENTROIDS
        return IN_CODES if self.summary_dtype == CODES else IN_16_BITS

    @property
    def words(self) -> str:
        """As parse_selection reads it."""
        return f"{self.method}:{self.budget.fraction:g}" + (f":{CODED_WORD}" if self.form == IN_CODES else "")

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "method": self.method, "budget": self.budget.fraction, "least_pages": self.budget.least_pages,
            "sink_pages": self.pins.sink_pages, "recent_pages": self.pins.recent_pages, "every": self.every,
            "dense_layers": self.dense_layers, "summary_dtype": self.summary_dtype,
        }  # fmt: skip


def parse_selection(text: str, *, every: int = 1, dense_layers: int = 2) -> SelectionSetup | None:
    """`mean_std:0.1`: the method, and the part of a row's pages that each KV head reads; `mean_std:0.1:8bit` by
    summaries in 8-bit codes; None of `off`. Centroids have codes of their own. ValueError naming select."""
    if text.strip() == OFF:
        return None
    name, colon, rest = text.strip().partition(":")
    budget, more, coding = rest.partition(":")
    if name not in BY_SUMMARIES or not colon or (more and coding != CODED_WORD):
        names = " or ".join(BY_SUMMARIES)
        raise ValueError(f"select: expected METHOD:BUDGET or METHOD:BUDGET:{CODED_WORD} with a method of {names}, or "
                         f"{OFF}, got {text!r}")  # fmt: skip
    try:
        part = float(budget)
    except ValueError:
        raise ValueError(f"select: expected METHOD:BUDGET with a number in (0, 1], got {text!r}") from None
    try:
        found = Budget(part)
    except ValueError as error:
        raise ValueError(f"select: {error}") from None
    if more and BY_SUMMARIES[name].SUMMARY == CENTROIDS:
        raise ValueError(f"select: expected METHOD:BUDGET of centroids, which are 4-bit codes, got {text!r}")
    return SelectionSetup(name, found, every=check_int("select_every", every, 1, MAX_TOKENS),
                          dense_layers=dense_layers, summary_dtype=CODES if more else None)  # fmt: skip


@compiled
def head_summary_bytes(head_dim: int, form: int) -> int:
    """Bytes of one page's summary of one KV head."""
    if form == IN_CENTROIDS:
        return PARTS * (head_dim // ELEMENTS_PER_BYTE + CENTROID_SCALE_BYTES)
    if form == IN_CODES:
        return SUMMARY_VECTORS * (head_dim * CODE_BYTES + CODE_SCALE_BYTES)
    return SUMMARY_VECTORS * head_dim * ELEMENT_BYTES


def summary_bytes(shape: DecodeShape, setup: SelectionSetup) -> int:
    """Bytes of one page's summary over the KV heads of a layer."""
    return shape.num_kv_heads * int(head_summary_bytes(shape.head_dim, setup.form))


drop_stale("pkvsim")
