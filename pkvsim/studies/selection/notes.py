"""What a reader must know of figures that selected pages are part of."""
from __future__ import annotations

from pkvsim.devices.selection_constants import SelectionEntry


def price_note(entry: SelectionEntry) -> str:
    """What prices of selected pages stand on."""
    if entry.status != "fitted":
        return "prices of selected pages: an assumption, those of an H200 with this GPU's bandwidth and SMs"
    known = []
    if entry.in_sample is not None:
        known.append(f"off by {entry.in_sample.mean_percent:.1f} % in the mean of them")
    if entry.held_out is not None:
        known.append(f"{entry.held_out.mean_percent:.1f} % on each by a fit to the others")
    return ", ".join((f"prices of selected pages: fitted to {len(entry.cells)} measured steps", *known))
