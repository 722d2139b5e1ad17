"""Axes of a sweep over the tiers behind a server's GPU."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pkvsim.devices.device import DeviceSpec
from pkvsim.memory.tier_options import TierSetup
from pkvsim.memory.tier_presets import NamedTiers
from pkvsim.studies.cells import switch

NO_TIERS = "none"
FIELDS = {
    "placement": "placement", "retention": "retention", "tier_admission": "admission", "tier_hold_cost": "hold_cost",
    "load_or_recompute": "load", "serial_reads": "serial", "host_link": "host_link_gb_s",
}  # fmt: skip
TIER_AXES = ("tiers", *FIELDS)


def tiers_at(place: Mapping[str, Any], named: NamedTiers, device: DeviceSpec) -> TierSetup | None:
    """The tiers of one cell behind its GPU: `tiers` names them with + between, or none; what no axis sets is as in
    named. ValueError naming the axis."""
    changed = {field: place[name] for name, field in FIELDS.items() if name in place}
    if "serial" in changed:
        changed["serial"] = switch("serial_reads", changed["serial"])
    if place.get("tiers") == NO_TIERS:
        return None
    if "tiers" in place:
        named = replace(named, names=tuple(place["tiers"].split("+")))
    if not named.names:
        if changed:
            names = ", ".join(name for name in FIELDS if name in place)
            raise ValueError(f"over: {names}: expected only with --tier, or tiers as another axis")
        return None
    return replace(named, **changed).setup(device.tiers, device.host_read_gb_s)
