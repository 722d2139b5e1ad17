"""Methods by words: `centroids+linf+heads` is a base with changes to its summaries, its scores or its budgets."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pkvsim.selection import centroids
from pkvsim.selection.rules import Budget, Pins

DENSE_LAYERS = 2
LEAST_PAGES = 8
EARLY_LAYERS = 8  # of those that are not dense, which `early` gives more
BASES = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest", "quest_softmax", "kascade", "twilight",
         "streaming_llm", "random")  # fmt: skip
SCORED = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest_softmax")


@dataclass(frozen=True, slots=True)
class Variant:
    """A method as its words say.

    Of centroids (engines have none of these, but a part more is a row more, and all others cost only where summaries
    are made): `parts12` (16: each token by itself), `bits8` or `bits0` (no codes), `linf` (farthest by the largest
    difference of an element, not by the sum of squares), `weighted` (elements in proportion to the root mean square of
    the prompt's last queries), `spread1` (with `weighted`: each part's count with so many expected deviations of its
    tokens' logits).
    Of scores: `largest` (the largest of a group's query heads in place of their mean).
    Of budgets: `heads` (that of all heads of a layer to the largest scores, half of each head's its own), `early2`
    (layers 2 to 9 have so many times the pages, the others fewer, the same in all), `p0.8` (top p, at most three times
    the budget's pages), `dense4` (first layers that read everything), `pins1.4` (first and last pages).
    """

    base: str
    parts: int = centroids.PARTS
    bits: int = 4
    linf: bool = False
    weighted: bool = False
    spread: float = 0.0
    largest: bool = False
    heads: bool = False
    early: float = 1.0
    p: float | None = None
    dense: int = DENSE_LAYERS
    pins: Pins = Pins(1, 2)  # noqa: RUF009

    def fraction(self, asked: float, layer: int, layers: int | None) -> float:
        """Of a row's pages, in a layer of a model of so many; None: every layer has what is asked."""
        selecting = (layers or 0) - DENSE_LAYERS
        if self.early == 1 or selecting <= self.early * EARLY_LAYERS:
            return asked
        first = layer < DENSE_LAYERS + EARLY_LAYERS
        others = (selecting - self.early * EARLY_LAYERS) / (selecting - EARLY_LAYERS)
        return min(1.0, asked * (self.early if first else others))

    def pages(self, fraction: float, row_pages: int) -> int:
        """Pages that each head reads of a row of so many."""
        return Budget(fraction, LEAST_PAGES).pages(row_pages, self.pins)


def parse(method: str) -> Variant:
    """Raises ValueError naming methods."""
    base, *words = method.split("+")
    if base not in BASES:
        raise ValueError(f"methods: expected one of {', '.join(BASES)}, got {base!r}")
    found: dict[str, Any] = {}
    for word in words:
        name = next((name for name, (number, _) in WORDS.items() if re.fullmatch(name + number, word)), None)
        if name is None or name in found:
            raise ValueError(f"methods: expected words of {', '.join(WORDS)}, each once, got {word!r} in {method!r}")
        try:
            found[name] = WORDS[name][1](word.removeprefix(name))
        except ValueError as error:
            raise ValueError(f"methods: {error}, got {word!r} in {method!r}") from None
    for need, names in ((("centroids",), OF_CENTROIDS), (SCORED, tuple(WORDS))):
        if base not in need and set(names) & set(found):
            raise ValueError(f"methods: expected {' or '.join(need)} with such words, got {method!r}")
    if "spread" in found and "weighted" not in found:
        raise ValueError(f"methods: expected weighted with spread, got {method!r}")
    if "heads" in found and "p" in found:
        raise ValueError(f"methods: expected heads or p, not both, got {method!r}")
    return Variant(base, **found)


def _within(low: float, high: float, kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not low <= (value := kind(text)) <= high:
            raise ValueError(f"expected a number from {low} to {high}")
        return value

    return read


def _pins(text: str) -> Pins:
    first, last = (int(one) for one in text.split("."))
    return Pins(first, last)


_COUNT, _NUMBER = "[0-9]+", r"[0-9]+(\.[0-9]+)?"
# Of each word its number, and how that is read.
WORDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "parts": (_COUNT, _within(1, 16, int)), "bits": (_COUNT, _within(0, 8, int)), "linf": ("", lambda _: True),
    "weighted": ("", lambda _: True), "spread": (_NUMBER, _within(0, 10, float)), "largest": ("", lambda _: True),
    "heads": ("", lambda _: True), "early": (_NUMBER, _within(1, 3, float)), "p": (_NUMBER, _within(0, 1, float)),
    "dense": (_COUNT, _within(DENSE_LAYERS, 99, int)), "pins": (r"[0-9]+\.[0-9]+", _pins),
}  # fmt: skip
OF_CENTROIDS = ("parts", "bits", "linf", "weighted", "spread")
