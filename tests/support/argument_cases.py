"""Ways to get the engine's arguments wrong: every array of plan(), run() and append(), and every plain value."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.prefixes import SharingRule

Place = Callable[[np.ndarray], object]  # to the GPU, whichever library's


@dataclass(frozen=True, slots=True)
class Wrong:
    """An array turned into one that cannot be taken: on the host beforehand, or as a view once it is placed."""

    before: Callable[[np.ndarray], np.ndarray] = lambda array: array
    after: Callable[[object], object] = lambda array: array
    placed: bool = True

    def make(self, array: np.ndarray, place: Place) -> object:
        array = np.ascontiguousarray(self.before(array))
        return self.after(place(array) if self.placed else array)


def _apart(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)


def _other_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype != np.float32 else np.float16)


WRONG = {
    "another dtype": Wrong(before=_other_dtype),
    "16-bit integers": Wrong(before=lambda array: np.zeros(array.shape, np.int16)),
    "an axis more": Wrong(before=lambda array: array[None]),
    "an axis less": Wrong(before=lambda array: array[0] if array.ndim > 1 else np.zeros(1, array.dtype)),
    "no elements": Wrong(before=lambda array: array[:0]),
    "a row more": Wrong(before=lambda array: np.concatenate([array, array[:1]])),
    "elements apart": Wrong(before=_apart, after=lambda array: array[..., ::2]),
    "on the host": Wrong(placed=False),
    "text": Wrong(after=lambda _: "text"),
    "a number": Wrong(after=lambda _: 1.5),
    "a list of text": Wrong(after=lambda _: ["a", "b"]),
}
# What is right after all, by (kind of array, way).
HARMLESS = {
    ("table", "on the host"),
    ("pages", "a row more"),
    ("indices", "a row more"),
    ("indices", "no elements"),
    ("indices", "an axis less"),
    ("block_table", "no elements"),
    ("optional", "no elements"),
}

BAD_ENGINES = {
    "shape": (None, 1, "shape", (8, 2, 64, 16)),
    "dtype": ("float32", "", None, 16, np.float16, ["float16"]),
    "schedule": ("", "nothing", None, 3, ["balanced"]),
    "tile_tokens": (0, -16, 8, 1.5, None, "32", True),
    "num_ctas": (0, -1, 2**20, 1.5, "4", True),
    "costs": (
        7, "7", (7, 8, 2, 80), [7],
        *(BalancedCosts(segment=wrong) for wrong in (-1, 2**21, 0.5, None, "1")),
        *(BalancedCosts(minimum=wrong) for wrong in (0, -1, 2**21, 1.5, None)),
        *(BalancedCosts(part=wrong) for wrong in (-1, 2**21, 1.5, "1")),
        *(BalancedCosts(pair=wrong) for wrong in (-1, 2**21, 1.5, "1")),
    ),
    "variant": (8, (8,), (0, 2), (8, 0), ("8", 2), (64, 64), "88", (1.5, 2)),
    "options": (None, 1, {}, "window"),
    "layout": ("", "HDN", None, 1, ["HND"]),
    "scale": (float("nan"), float("inf"), "1", 1j, [1.0]),
    "sharing_rule": (5, (1, 2), SharingRule(-1, 0), SharingRule(1.5, 0), SharingRule(0, 2**31)),
    "read_stages": (0, -1, 1.5, "4", True, 1000),
}
BAD_WRITERS = {
    "shape": BAD_ENGINES["shape"],
    "dtype": ("float32", "int8", None, 16),
    "kv_dtype": ("float32", "bfloat16", "float8", 8),
    "layout": ("", "HDN", None, 1),
    "head_dim_v": (0, -16, 8, 520, 1.5, "64"),
    "rope": (1, "half", object()),
}
BAD_SCALES = (float("nan"), float("inf"), float("-inf"), "1", 1j, [1.0], object())
BAD_SPLITS = (0, -1, 1.5, "4", [1], [1, 0])


def names_of(name: str, method: str) -> tuple[str, ...]:
    """The arguments that may be named where `name` is wrong: a size that two share is either's fault."""
    if method == "plan":
        return ("seq_lens", "block_table", "indptr", "indices", "last_page_len")
    if method == "append":
        return (
            name,
            *{
                "k_pages": ("v_pages",),
                "k_new": ("v_new", "token_offsets"),
                "seq_lens": ("block_table", "k_new"),
                "block_table": ("seq_lens",),
                "q": ("q_out",),
            }.get(name, ()),
        )
    return (name, *{"k_pages": ("v_pages",), "q": ("out", "lse")}.get(name, ()))


def kind_of(name: str, method: str) -> str:
    if method == "plan":
        return "table"
    return "pages" if name in ("k_pages", "v_pages") else "array"


def is_harmless(name: str, method: str, way: str) -> bool:
    return (kind_of(name, method), way) in HARMLESS or (name, way) in HARMLESS
