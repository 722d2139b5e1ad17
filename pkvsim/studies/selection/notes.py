"""What a reader must know of figures that selected pages are part of."""
from __future__ import annotations

from collections.abc import Iterable

from pkvsim.devices.derive import selection_entry
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.selection_constants import SelectionEntry
from pkvsim.models.decode_groups import decode_groups
from pkvsim.models.presets import ModelSpec, kv_bytes_per_token
from pkvsim.policy.selecting import LEAST_GAIN
from pkvsim.selection.setup import SelectionSetup
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.selection.memory import selecting_layers, summary_page_bytes
from pkvsim.studies.provenance import Basis


def selection_notes(
    setup: SelectionSetup | None, model: ModelSpec, device: DeviceSpec, page_size: int, results: Iterable[ServingResult]
) -> tuple[str, ...]:
    """Of a server's runs; none where it selects nothing."""
    if setup is None:
        return ()
    groups = decode_groups(model, page_size)
    layers = sum(selecting_layers(groups, setup))
    share = summary_page_bytes(model, page_size, setup) / (kv_bytes_per_token(model) * page_size)
    never = [run.policy for run in results if not run.summary["selection"]["steps"]]
    every = "" if setup.every == 1 else f", new ones in every {setup.every}th layer"
    found = [
        f"{setup.words}: {layers} of {sum(group.count for group in groups)} layers read selected pages{every}, by the "
        f"balanced route, in steps where that saves a layer {LEAST_GAIN:.0%}; their summaries take {share:.1%} of the "
        "KV pages' bytes beside them; prompts' summaries cost nothing here, and what answers lose is not simulated",
        price_note(selection_entry(device)),
    ]
    if never:
        found.append(f"no step selected under {', '.join(never)}")
    return tuple(found)


def selection_basis(device: DeviceSpec) -> Basis:
    """What times of selected pages stand on."""
    entry = selection_entry(device)
    error = entry.held_out or entry.in_sample
    return Basis(
        quantity="selected pages", basis=entry.status, source=entry.source,
        error_percent=None if error is None else error.mean_percent,
    )  # fmt: skip


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
