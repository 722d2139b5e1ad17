"""PagedSelection: a model's decode steps over selected pages, layer by layer, for caches that append as they go."""
from __future__ import annotations

from gpu.engine.schedule_engine import ScheduleEngine
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run
from gpu.selection import variant
from gpu.selection.page_selector import PageSelector
from gpu.selection.page_summaries import PageSummaries
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions
from pkvsim.selection import by_name
from pkvsim.selection.rules import Budget, Pins
from pkvsim.shapes import check_int


class PagedSelection:
    """Summaries of every layer's pages, and the lists that its decode steps read.

    keep() follows each append, attend() takes the place of a dense step. The first dense_layers layers read all pages.
    """

    __slots__ = ("method", "budget", "pins", "dense_layers", "summary_dtype", "_summaries", "_selectors", "_engines")

    def __init__(self, method: str = by_name.DEFAULT, budget: Budget | float = Budget(), *,  # noqa: B008
                 pins: Pins = Pins(), dense_layers: int = 2, summary_dtype: str | None = None) -> None:  # noqa: B008
        """method: "mean_std" or "quest". budget: of pages, or the fraction of one. summary_dtype: as PageSummaries
        takes it. Raises ValueError naming the argument."""
        by_name.method(method)
        variant.check_summary_dtype(summary_dtype)
        self.summary_dtype = summary_dtype
        self.method, self.pins = method, pins
        self.budget = budget if isinstance(budget, Budget) else Budget(budget)
        self.dense_layers = check_int("dense_layers", dense_layers, 0)
        self._summaries: dict[int, PageSummaries] = {}
        self._selectors: dict[tuple, PageSelector] = {}
        self._engines: dict[tuple, ScheduleEngine] = {}

    def serves(self, layer: int, *, window: int | None) -> bool:
        """Whether the layer's steps are selected: it is none of the dense ones, and no window says what it reads."""
        return layer >= self.dense_layers and window is None

    def keep(self, layer: int, num_q_heads: int, k_pages: object, seq_lens: object, block_table: object,
             new_tokens: int) -> None:
        """Summarises the pages of each row's last new_tokens tokens, which have just been appended.

        k_pages [num_pages, num_kv_heads, page_size, head_dim]; seq_lens [batch_size] int32 with the new tokens counted
        in, block_table [batch_size, max_pages] int32. Raises ValueError naming the argument.
        """
        view = arrays.view("k_pages", k_pages)
        if layer not in self._summaries:
            checks.expect("k_pages", "[num_pages, num_kv_heads, page_size, head_dim]", view, len(view.shape) == 4)
            shape = DecodeShape(num_q_heads, view.shape[1], view.shape[3], view.shape[2])
            kind = by_name.method(self.method).SUMMARY
            self._summaries[layer] = PageSummaries(shape, k_pages, view.dtype, kind=kind,
                                                   summary_dtype=self.summary_dtype)
        self._summaries[layer].update(k_pages, seq_lens, block_table, new_tokens=new_tokens)

    def attend(self, layer: int, q: object, k_pages: object, v_pages: object, seq_lens: object, block_table: object, *,
               scale: float | None = None, soft_cap: float | None = None, sinks: object = None) -> object:
        """The layer's attention, like q [batch_size, num_q_heads, head_dim], over the pages that its budget takes.

        Raises ValueError naming the argument; KeyError for a layer that keep() has not seen.
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
