"""What selecting pages is to a step, in sentences."""
from __future__ import annotations

from pkvsim.studies.selection.notes import price_note
from pkvsim.studies.step_report import StepSelection


def selection_lines(found: StepSelection) -> tuple[str, ...]:
    """Its parts, what it reads, from which length on it pays, and what its prices stand on."""
    layer, setup = found.layer, found.setup
    every = "" if setup.every == 1 else f" for {setup.every} layers"
    from_tokens = "never" if found.least_tokens is None else f"from {found.least_tokens:,} tokens a row on"
    return (
        f"selected: {setup.words}{every}: {layer.selected.keep:,.1f} us for summaries, {layer.selected.select:,.1f} to "
        f"select, {layer.selected.attend:,.1f} to attend to {found.listed_bytes / 1e6:,.1f} MB, where all pages take "
        f"{layer.dense_us:,.1f}; for as many equally long rows it pays {from_tokens}",
        f"summaries: {found.scored_bytes / 1e6:,.1f} MB a layer, {found.summary_share:.1%} of its KV pages",
        price_note(found.entry),
    )
