"""Axes of a sweep over the tiers behind a server's GPU."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pkvsim.devices.device import DeviceSpec
from pkvsim.memory.tier_options import TierSetup
from pkvsim.memory.tier_presets import find_tiers

NO_TIERS = "none"
FIELDS = {"placement": "placement", "retention": "retention", "tier_admission": "admission",
          "load_or_recompute": "load"}  # fmt: skip
TIER_AXES = ("tiers", *FIELDS)


def tiers_at(place: Mapping[str, Any], setup: TierSetup | None, device: DeviceSpec) -> TierSetup | None:
    """The tiers of one cell: `tiers` names them with + between, or none; what no axis sets is as in setup. ValueError
    naming the axis."""
    changed = {field: place[name] for name, field in FIELDS.items() if name in place}
    if "tiers" in place:
        if place["tiers"] == NO_TIERS:
            return None
        found = find_tiers(place["tiers"].split("+"), device.tiers)
        setup = TierSetup(tiers=found) if setup is None else replace(setup, tiers=found)
    if setup is None:
        if changed:
            raise ValueError(f"over: {', '.join(changed)}: expected only with --tier, or tiers as another axis")
        return None
    return replace(setup, **changed)
