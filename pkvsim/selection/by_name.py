"""The methods that choose pages by their summaries in every step."""
from __future__ import annotations

from types import ModuleType

import numpy as np

from pkvsim.schedule.page_lists import PageList
from pkvsim.selection.methods import centroids, mean_std, quest
from pkvsim.selection.rules import Budget, Pins, lists_of, top_pages
from pkvsim.selection.summaries import as_kept, check_form
from pkvsim.shapes import DecodeShape, StepState, describe

DEFAULT = "mean_std"
BY_SUMMARIES = {"mean_std": mean_std, "quest": quest, "centroids": centroids}


def method(name: str) -> ModuleType:
    """The module of a method. Raises ValueError naming method."""
    if not isinstance(name, str) or name not in BY_SUMMARIES:
        raise ValueError(f"method: expected one of {', '.join(BY_SUMMARIES)}, got {name!r}")
    return BY_SUMMARIES[name]


def select_pages(
    name: str, shape: DecodeShape, q: np.ndarray, k_pages: np.ndarray, block_table: np.ndarray, seq_lens: np.ndarray, *,
    budget: Budget = Budget(), pins: Pins = Pins(), scale: float | None = None,  # noqa: B008
    max_selected: int | None = None, summary_dtype: str | None = None,
) -> PageList:  # fmt: skip
    """The lists of a step by a method's name, from the keys themselves in float64.

    q [batch_size, num_q_heads, head_dim], k_pages [num_pages, num_kv_heads, page_size, head_dim], block_table
    [batch_size, max_pages], seq_lens [batch_size] integers. scale: 1 / sqrt(head_dim) by default. summary_dtype:
    "uint8" for summaries in 8-bit codes; centroids are in codes of their own. Raises ValueError naming the argument.
    """
    rule, group = method(name), shape.group_size
    check_form(rule.SUMMARY, summary_dtype)
    step, q, k_pages = StepState(seq_lens, block_table), np.asarray(q), np.asarray(k_pages)
    pages = (len(k_pages) if k_pages.ndim else 0, shape.num_kv_heads, shape.page_size, shape.head_dim)
    for given, array, wanted in (("q", q, (step.batch_size, shape.num_q_heads, shape.head_dim)),
                                 ("k_pages", k_pages, pages)):  # fmt: skip
        if array.shape != wanted:
            raise ValueError(f"{given}: expected {list(wanted)}, got {describe(array)}")
    step.check_pages(shape, num_pages=len(k_pages))
    table = np.asarray(step.block_table)
    scale = shape.head_dim**-0.5 if scale is None else scale
    chosen: list[list[np.ndarray]] = []
    for row, length in enumerate(step.seq_lens.tolist()):
        at = np.arange(length)
        ids, slots = table[row, at // shape.page_size], at % shape.page_size
        count = budget.pages(-(-length // shape.page_size), pins)
        lists = []
        for head in range(shape.num_kv_heads):
            keys = k_pages[ids, head, slots].astype(np.float64).reshape(length, shape.head_dim)
            found = as_kept(keys, shape.page_size, rule.SUMMARY, summary_dtype)
            own = q[row, head * group : (head + 1) * group].astype(np.float64)
            lists.append(top_pages(rule.scores(own, found, scale), count, pins) if length else np.zeros(0, np.int32))
        chosen.append(lists)
    return lists_of(chosen, max_selected)
