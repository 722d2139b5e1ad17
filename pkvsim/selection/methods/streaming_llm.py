"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first tokens, which attention uses as sinks, and the
last.

It scores nothing. The paper keeps four sink tokens, which any page size of four or more holds in one page.
"""
from __future__ import annotations

import numpy as np

from pkvsim.selection.rules import Pins, top_pages

SINK_TOKENS = 4


def pins(count: int, page_size: int) -> Pins:
    """Of a budget of so many pages: the pages of the sinks, and the last ones."""
    sinks = min(count, -(-SINK_TOKENS // page_size))
    return Pins(sinks, count - sinks)


def places(row_pages: int, count: int, page_size: int) -> np.ndarray:
    """The pages that a row of so many keeps, ascending."""
    return top_pages(np.zeros(row_pages), min(count, row_pages), pins(count, page_size))
