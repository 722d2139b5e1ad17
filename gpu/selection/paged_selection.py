"""PagedSelection: a model's decode steps over selected pages, layer by layer, for caches that append as they go."""
from __future__ import annotations

import numpy as np

from gpu.engine.schedule_engine import ScheduleEngine
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run
from gpu.selection.page_selector import PageSelector
from gpu.selection.page_summaries import PageSummaries
from gpu.selection.step_rule import StepRule
from pkvsim import DecodeShape
from pkvsim.devices.device import DeviceSpec
from pkvsim.options import AttentionOptions
from pkvsim.selection import by_name
from pkvsim.selection.rules import Budget, Pins
from pkvsim.selection.setup import SelectionSetup
from pkvsim.selection.summaries import check_form
from pkvsim.shapes import check_int


class PagedSelection:
    """Summaries of every layer's pages, and the lists that its decode steps read.

    keep() follows each append and says whether attend() is to take the place of a dense step. The first dense_layers
    layers read all pages.

    By the prices of a device, steps that are too short for lists to pay go dense, and cost no more than that: summaries
    are not kept in them, and those of all pages are made anew in the first step that selects. Where the host has bounds
    of the rows' lengths these decide; where it has none, and in a graph under capture, the room of the block table
    does: a graph keeps one shape for its life, so it selects if rows that fill their tables would. A layer that was
    captured so always selects from then on, since nobody sees the graph's replays. Capture after an eager step that
    selected: a graph captured before would make all summaries anew in every replay.
    """

    __slots__ = ("method", "budget", "pins", "dense_layers", "summary_dtype", "rule", "_summaries", "_selectors",
                 "_engines", "_behind", "_captured")

    def __init__(self, method: str = by_name.DEFAULT, budget: Budget | float = Budget(), *,  # noqa: B008
                 pins: Pins = Pins(), dense_layers: int = 2, summary_dtype: str | None = None,  # noqa: B008
                 device: DeviceSpec | None = None) -> None:
        """method: "mean_std", "quest" or "centroids". budget: of pages, or the fraction of one. summary_dtype: as
        PageSummaries takes it. device: by whose prices short steps go dense; None: every step selects. Raises
        ValueError naming the argument."""
        check_form(by_name.method(method).SUMMARY, summary_dtype)
        self.summary_dtype = summary_dtype
        checks.expect("pins", "Pins", repr(pins), isinstance(pins, Pins))
        self.method, self.pins = method, pins
        self.budget = budget if isinstance(budget, Budget) else Budget(budget)
        self.dense_layers = check_int("dense_layers", dense_layers, 0)
        self.rule = StepRule(device, SelectionSetup(method, self.budget, self.pins, dense_layers=self.dense_layers,
                                                    summary_dtype=summary_dtype))
        self._behind: set[int] = set()  # layers whose summaries lack pages
        self._captured: set[int] = set()  # layers of which a graph keeps the summaries
        self._summaries: dict[int, PageSummaries] = {}
        self._selectors: dict[tuple, PageSelector] = {}
        self._engines: dict[tuple, ScheduleEngine] = {}

    def serves(self, layer: int, *, window: int | None) -> bool:
        """Whether the layer's steps are selected: it is none of the dense ones, and no window says what it reads."""
        return layer >= self.dense_layers and window is None

    def keep(self, layer: int, num_q_heads: int, k_pages: object, seq_lens: object, block_table: object,
             new_tokens: int, *, bounds: np.ndarray | None = None) -> bool:
        """Whether the layer selects; then summarises the pages of each row's last new_tokens tokens, which have just
        been appended, or all pages where steps went dense before.

        k_pages [num_pages, num_kv_heads, page_size, head_dim]; seq_lens [batch_size] int32 with the new tokens counted
        in, block_table [batch_size, max_pages] int32. bounds [batch_size] int64 on the host, each at least the row's
        length: None where nobody knows more than the table's room. Raises ValueError naming the argument.
        """
        view = arrays.view("k_pages", k_pages)
        checks.expect("k_pages", "[num_pages, num_kv_heads, page_size, head_dim]", view, len(view.shape) == 4)
        shape = DecodeShape(num_q_heads, view.shape[1], view.shape[3], view.shape[2])
        capturing = arrays.is_capturing(arrays.current_stream(view.library, view.device))
        if not self._selects(layer, shape, arrays.view("block_table", block_table).shape, bounds, capturing):
            self._behind.add(layer)
            return False
        if layer not in self._summaries:
            kind = by_name.method(self.method).SUMMARY
            self._summaries[layer] = PageSummaries(shape, k_pages, view.dtype, kind=kind,
                                                   summary_dtype=self.summary_dtype)
        new = None if layer in self._behind else new_tokens
        self._summaries[layer].update(k_pages, seq_lens, block_table, new_tokens=new)
        if capturing:
            self._captured.add(layer)
        else:
            self._behind.discard(layer)
        return True

    def _selects(self, layer: int, shape: DecodeShape, table_shape: tuple[int, ...], bounds: np.ndarray | None,
                 capturing: bool) -> bool:
        """The decision for a step. A table whose room is too small for lists to pay never selects, so that no graph
        needs summaries that an eager step has not kept."""
        batch_size, max_pages = table_shape
        if not self.rule.pays(shape, np.full(batch_size, max_pages * shape.page_size)):
            return False
        return bounds is None or capturing or layer in self._captured or self.rule.pays(shape, bounds)

    def attend(self, layer: int, q: object, k_pages: object, v_pages: object, seq_lens: object, block_table: object, *,
               scale: float | None = None, soft_cap: float | None = None, sinks: object = None) -> object:
        """The layer's attention, like q [batch_size, num_q_heads, head_dim], over the pages that its budget takes.

        Raises ValueError naming the argument; KeyError for a layer of which keep() never said that it selects.
        """
        summaries = self._summaries[layer]
        options = AttentionOptions(soft_cap=soft_cap, sinks=sinks is not None)
        key = summaries.shape, summaries.dtype, options, scale
        if key not in self._engines:
            self._engines[key] = ScheduleEngine(summaries.shape, summaries.dtype, options=options, scale=scale)
            self._selectors[key] = PageSelector(summaries.shape, summaries.dtype, self.method, budget=self.budget,
                                                pins=self.pins, scale=scale, summary_dtype=self.summary_dtype)
        engine, selector = self._engines[key], self._selectors[key]
        selector.plan(seq_lens, block_table)
        engine.plan(StepTables(seq_lens, block_table))
        lists = selector.select(q, summaries)
        out, _ = engine.run(Run(q, k_pages, v_pages, sinks=sinks, selected=lists))
        return out

    def reset(self) -> None:
        """Forgets the summaries, whose pages belong to nobody any more."""
        self._summaries.clear()
        self._behind.clear()
        self._captured.clear()
