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
BASES = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest", "quest_softmax", "kascade", "twilight",
         "streaming_llm", "random")  # fmt: skip
SCORED = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest_softmax")


@dataclass(frozen=True, slots=True)
class Variant:
    """A method as its words say.

    Of centroids (engines have none of these; a part more is a row more, all others cost only where summaries are
    made): `parts12` (16: each token by itself), `bits8` or `bits0` (no codes), `linf` (the farthest token by the
    largest difference of an element, not by the sum of squares), `weighted` (elements in proportion to the root mean
    square of queries, known of a model by another text), `spread1` (a part's count times e to as many deviations of its
    tokens' logits, as those queries have them in the mean).
    Of scores: `largest` (the largest of a group's query heads in place of their mean).
    Of budgets: `heads` (that of all heads of a layer to the largest scores, half of each head's its own), `early8x2`
    (the first 8 layers that are not dense have 2 times the pages, the others fewer, the same in all), `p0.8` (top p, at
    most three times the budget's pages), `dense4` (first layers that read all), `pins1.4` (first and last pages).
    """

    base: str
    parts: int = centroids.PARTS
    bits: int = 4
    linf: bool = False
    weighted: bool = False
    spread: float = 0.0
    largest: bool = False
    heads: bool = False
    early: tuple[int, float] = (0, 1.0)
    p: float | None = None
    dense: int = DENSE_LAYERS
    pins: Pins = Pins(1, 2)  # noqa: RUF009

    @property
    def summaries(self) -> tuple[str, ...]:
        """What tells the summaries of two methods apart."""
        return self.base.split("_soft")[0], *(str(getattr(self, name)) for name in OF_CENTROIDS)

    def fraction(self, asked: float, layer: int, layers: int | None) -> float:
        """Of a row's pages, in a layer of a model of so many; every layer has what is asked where these are too few for
        what `early` gives, or unknown."""
        early, times = self.early
        selecting = (layers or 0) - DENSE_LAYERS
        if selecting <= times * early:
            return asked
        first, others = layer < DENSE_LAYERS + early, (selecting - times * early) / (selecting - early)
        return min(1.0, asked * (times if first else others))

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


def _early(text: str) -> tuple[int, float]:
    layers, times = text.split("x")
    return int(layers), float(times)


_COUNT, _NUMBER = "[0-9]+", r"[0-9]+(\.[0-9]+)?"
# Of each word its number, and how that is read.
WORDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "parts": (_COUNT, _within(1, 16, int)), "bits": (_COUNT, _within(0, 8, int)), "linf": ("", lambda _: True),
    "weighted": ("", lambda _: True), "spread": (_NUMBER, _within(0, 10, float)), "largest": ("", lambda _: True),
    "heads": ("", lambda _: True), "early": (f"{_COUNT}x{_NUMBER}", _early), "p": (_NUMBER, _within(0, 1, float)),
    "dense": (_COUNT, _within(DENSE_LAYERS, 99, int)), "pins": (r"[0-9]+\.[0-9]+", _pins),
}  # fmt: skip
OF_CENTROIDS = ("parts", "bits", "linf", "weighted", "spread")
