"""Whether a step's layers read selected pages or all: by price, the same for the simulator and the GPU.

A selected layer summarises its new tokens' pages, scores and selects, and attends to the lists; a dense one attends to
all pages. Both are priced on the balanced route, which alone reads lists. Lists are an approximation, so a layer
selects only where that saves at least LEAST_GAIN of the dense layer's time, and a step that is too short goes dense.

Where the host knows no lengths, the step is priced at their bounds: a captured graph holds one shape for its life, so
it selects where rows as long as its tables have room for would, whatever they are when it is replayed. A graph captured
for long rows then selects for short ones too, at select_us above a dense step at most.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.compiled import compiled, drop_stale
from pkvsim.devices.derive import device_routes, selection_entry
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.selection_constants import SelectionConstants
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.cuts import sorted_lengths
from pkvsim.pricing.layer import Heads, heads_of
from pkvsim.pricing.prices import price_route
from pkvsim.pricing.selected import ListRule, SelectedUs, list_rule, listed_tokens, selected_us
from pkvsim.selection.served import why_not_selected
from pkvsim.selection.setup import SelectionSetup
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens

LEAST_GAIN = 0.05  # of a dense layer's time; as far as prices are trusted, and less than that is not worth the pages


@compiled
def pays(dense_us: float, selected_layer_us: float) -> bool:
    """Whether a layer of this price selects."""
    return selected_layer_us <= (1.0 - LEAST_GAIN) * dense_us


@dataclass(frozen=True, slots=True)
class LayerPrices:
    """One layer's kernel times in a step, microseconds, on a GPU that never waits for the host."""

    dense_us: float
    selected: SelectedUs

    @property
    def selected_us(self) -> float:
        """Of the layer that selects: summaries, selecting and attention."""
        return float(sum(self.selected))

    @property
    def pays(self) -> bool:
        """Whether the layer selects."""
        return bool(pays(self.dense_us, self.selected_us))

    @property
    def taken_us(self) -> float:
        """What the layer takes by that decision."""
        return self.selected_us if self.pays else self.dense_us

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "dense_us": self.dense_us, "keep_us": self.selected.keep, "select_us": self.selected.select,
            "attend_us": self.selected.attend, "selected_us": self.selected_us, "pays": self.pays,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class SelectionPrices:
    """What pricing selected layers needs of one shape, GPU and setup, made once by selection_prices."""

    heads: Heads
    constants: np.ndarray  # [NUM_CONSTANTS] float64, of the balanced route
    rule: ListRule
    prices: SelectionConstants

    def of(self, seq_lens: Sequence[int] | np.ndarray) -> LayerPrices:
        """A layer over rows of seq_lens [batch_size]. ValueError naming seq_lens."""
        ordered = sorted_lengths(check_seq_lens(seq_lens))
        dense, _ = price_route(ordered, ordered, self.heads, self.constants, 0)
        return LayerPrices(dense, SelectedUs(*selected_us(ordered, self.heads, self.constants, self.rule, self.prices)))

    def lists(self, seq_lens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens that each KV head of each row reads, int32 [batch_size]."""
        lens = check_seq_lens(seq_lens).astype(np.int64)
        return listed_tokens(lens, self.heads.page_size, self.rule).astype(np.int32)

    def least_tokens(self, batch_size: int, most: int = MAX_TOKENS) -> int | None:
        """Tokens from which on batch_size equally long rows select, in whole pages; None: not up to `most`.

        Bisection, since what is saved grows with the length but for steps of whole CTAs.
        """
        check_int("batch_size", batch_size, 1, 1 << 16)
        page = self.heads.page_size

        def selects(pages: int) -> bool:
            return self.of(np.full(batch_size, pages * page, np.int32)).pays

        low, high = 1, 1
        while not selects(high):
            low, high = high + 1, high * 2
            if high * page > most:
                return None
        while low < high:
            middle = (low + high) // 2
            if selects(middle):
                high = middle
            else:
                low = middle + 1
        return low * page


def selection_prices(
    shape: DecodeShape, device: DeviceSpec, setup: SelectionSetup, *, options: AttentionOptions = PLAIN
) -> SelectionPrices:
    """Prices of one kind of layer. Raises ValueError naming what no kernel serves over lists."""
    reason = why_not_selected(shape, options)
    if reason is not None:
        raise ValueError(f"select: {reason}")
    return SelectionPrices(
        heads_of(shape, device.num_sms, options), device_routes(device)["balanced"].to_row(), list_rule(setup),
        selection_entry(device).constants,
    )  # fmt: skip


drop_stale("pkvsim")
