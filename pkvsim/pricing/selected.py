"""What layers cost that read selected pages: summaries scored, pages selected, lists attended to. Compiled.

A list is a row of its own with one KV head (pkvsim.schedule.page_lists). A budget gives all heads of a row as many
pages, so a step's lists cost what the balanced route asks for rows of that many tokens with all their KV heads, and
what reading them by lists adds.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.compiled import allocating, compiled, drop_stale, inner
from pkvsim.devices.selection_constants import SelectionConstants
from pkvsim.pricing.constants import BANDWIDTH, RUN
from pkvsim.pricing.layer import Heads
from pkvsim.pricing.prices import price_route
from pkvsim.pricing.step_times import step_time
from pkvsim.selection.rules import PARTS
from pkvsim.selection.setup import IN_16_BITS, SelectionSetup, head_summary_bytes

SELECT_CTAS = 2  # an SM, of a selecting launch over many lists, as cuda_src/select.cu bounds its registers


class ListRule(NamedTuple):
    """How many pages each list of a row has, as pkvsim.selection.rules says it."""

    parts: int  # of PARTS
    least_pages: int
    pinned_pages: int
    every: int  # layers that read one layer's lists
    form: int  # of summaries, as SelectionSetup.form says it


class SelectedUs(NamedTuple):
    """A layer's times, microseconds; the time of selecting is shared out over the layers that read its lists."""

    keep: float  # summarising the new tokens' pages
    select: float  # and the gap behind it
    attend: float


def list_rule(setup: SelectionSetup) -> ListRule:
    """The rule of a setup."""
    budget, pins = setup.budget, setup.pins
    return ListRule(budget.parts, budget.least_pages, pins.sink_pages + pins.recent_pages, setup.every, setup.form)


@inner
def tokens_of_list(length, page_size, rule):
    """Tokens of each list of a row: as many pages as Budget.pages says, whole ones, but no more than the row's."""
    pages = (length + page_size - 1) // page_size
    asked = max(rule.least_pages, (pages * rule.parts + PARTS - 1) // PARTS)
    return min(length, min(pages, max(asked, rule.pinned_pages)) * page_size)


@allocating
def listed_tokens(lengths: np.ndarray, page_size: int, rule: ListRule) -> np.ndarray:
    """tokens_of_list of rows of these lengths [rows] int64, in their order. A longer row never has a shorter list."""
    found = np.empty_like(lengths)
    for row in range(len(lengths)):
        found[row] = tokens_of_list(lengths[row], page_size, rule)
    return found


@compiled
def selecting_us(
    lengths: np.ndarray, heads: Heads, bandwidth_gb_s: float, form: int, prices: SelectionConstants
) -> float:
    """One selecting launch over rows of these lengths [rows] int64: all summaries at the streaming rate, one CTA's work
    on the longest list, and the waves in which CTAs begin other lists. Centroids are priced as 8-bit codes of their
    bytes, an assumption: no device file has constants of their own."""
    pages, longest = 0, 0
    for length in lengths:
        own = (length + heads.page_size - 1) // heads.page_size
        pages += own
        longest = max(longest, own)
    summary_bytes = pages * heads.num_kv_heads * head_summary_bytes(heads.head_dim, form)
    share = prices.score_share if form == IN_16_BITS else prices.coded_share
    at_once = SELECT_CTAS * heads.num_sms
    later_waves = max(0, (len(lengths) * heads.num_kv_heads + at_once - 1) // at_once - 1)
    streaming_us = summary_bytes / (bandwidth_gb_s * 1e3 * share)
    return prices.select_us + streaming_us + prices.page_us * longest + prices.list_us * later_waves


@allocating
def selected_us(
    ordered: np.ndarray,  # [rows] int64 > 0, longest first
    heads: Heads,
    constants: np.ndarray,  # [NUM_CONSTANTS] float64, of the balanced route
    rule: ListRule,
    prices: SelectionConstants,
) -> SelectedUs:
    """A layer whose heads read what is selected."""
    lists = listed_tokens(ordered, heads.page_size, rule)
    plain, _ = price_route(lists, lists, heads, constants, 0)
    select = (selecting_us(ordered, heads, constants[BANDWIDTH], rule.form, prices) + prices.gap_us) / rule.every
    keep = prices.keep_us + prices.keep_list_us * len(ordered) * heads.num_kv_heads
    if rule.form != IN_16_BITS:
        keep += prices.keep_coded_us
    return SelectedUs(keep, select, prices.attend_us + plain / prices.attend_share)


@compiled
def selected_step_time(
    constants: np.ndarray, rows: int, layers: int, layer_us: float, issue_us: float
) -> tuple[float, float]:
    """step_time (pkvsim.pricing.step_times) of a balanced step some of whose layers select: (gpu_us, host_us).

    layer_us: the mean layer's kernels. issue_us: what its selecting launches take the host more, in the mean; 0 in a
    captured graph.
    """
    gpu_us, host_us = step_time(constants, rows, 1, layers, layer_us)
    waits = max(0.0, (layers - 1) * (constants[RUN] - layer_us))
    more = max(0.0, (layers - 1) * (constants[RUN] + issue_us - layer_us))
    return gpu_us, host_us + issue_us + more - waits


drop_stale("pkvsim")
