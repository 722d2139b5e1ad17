"""Models for a GPU that nobody has calibrated: datasheet numbers through the efficiencies of one that was."""
from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

from pkvsim.devices.device import DEVICES, DeviceSpec
from pkvsim.devices.route_model import CalibratedRoute, RouteModel
from pkvsim.devices.selection_constants import SelectionEntry
from pkvsim.schedule.costs import BalancedCosts, default_costs

REFERENCE = "h200"  # whose measured efficiencies are carried over
WARPS = 8  # of a CTA that merges rows cut by split or workqueue, one column each at a time
FEWER_WARPS = {(8, 6): 4, (8, 9): 4, (12, 0): 4, (12, 1): 4}  # where an SM has no room for eight warps' tiles
LEAST_CAPABILITY = {"xqa": (9, 0)}  # FlashInfer's XQA kernels; its other backends and ours serve every GPU listed


def device_routes(device: DeviceSpec) -> dict[str, RouteModel]:
    """The device's own models; where it has none, those that derive_routes estimates."""
    return {name: entry.model for name, entry in all_routes(device).items()}


@cache
def all_routes(device: DeviceSpec) -> dict[str, CalibratedRoute]:
    """Every route of the device, with where its model comes from."""
    return derive_routes(device) | device.calibration


def balanced_costs(device: DeviceSpec) -> BalancedCosts:
    """What this GPU's balanced schedule weighs, for the engine as for its price: BalancedCosts.of_kernel makes them a
    kernel's."""
    return device_routes(device)["balanced"].costs


def merging_warps(compute_capability: tuple[int, int]) -> int:
    """Warps of a CTA of split and workqueue at heads of 128, as gpu.kernels chooses them for groups of up to 8."""
    return FEWER_WARPS.get(compute_capability, WARPS)


def derive_routes(device: DeviceSpec, *, reference: DeviceSpec | None = None) -> dict[str, CalibratedRoute]:
    """Every route of `reference` (the H200 by default) carried over to `device`; status "estimated".

    The rule: memory and L2 bandwidth scale with beta_gb_s, arithmetic per SM with the tensor-core peak per SM, L2
    capacity with its size; what one CTA reads is kept, because it is bytes in flight over latency, but never exceeds
    what the device reads in all; times that are latencies (launch, task, segment, merge, host planning) are kept; as
    many columns merge at a time as CTAs have warps there; the balanced schedule weighs what the engine takes on a GPU
    of this compute capability.
    """
    reference = reference or DEVICES[REFERENCE]
    memory = device.beta_gb_s / reference.beta_gb_s
    arithmetic = (device.fp16_tflops / device.num_sms) / (reference.fp16_tflops / reference.num_sms)
    warps = float(merging_warps(device.compute_capability))
    routes = {}
    for name, entry in reference.calibration.items():
        model = entry.model
        if device.compute_capability < LEAST_CAPABILITY.get(name, (0, 0)):
            continue
        routes[name] = CalibratedRoute(
            model=replace(
                model,
                bandwidth_gb_s=model.bandwidth_gb_s * memory,
                cta_read_gb_s=min(model.cta_read_gb_s, model.bandwidth_gb_s * memory),
                sm_heads_gb_s=_scaled(model.sm_heads_gb_s, arithmetic),
                l2_gb_s=_scaled(model.l2_gb_s, memory),
                l2_mb=model.l2_mb * device.l2_mib / reference.l2_mib,
                merge_columns=warps if model.merge_columns < math.inf else math.inf,
                costs=default_costs(device.compute_capability),
            ),
            status="estimated",
            source=f"{reference.name}'s model scaled by bandwidth and arithmetic of the datasheets "
            "(pkvsim.devices.derive)",
            date=entry.date,
        )
    return routes


def selection_entry(device: DeviceSpec) -> SelectionEntry:
    """What prices selected pages: the device's own entry, or the reference GPU's, "assumed", whose shares are of this
    device's bandwidth and whose times are kept. ValueError where neither has one."""
    if device.selection is not None:
        return device.selection
    entry = DEVICES[REFERENCE].selection
    if entry is None:
        raise ValueError(f"device: expected one with prices of selected pages, got {device.name}")
    return replace(entry, status="assumed", source=f"{REFERENCE}'s: {entry.source}", in_sample=None, held_out=None)


def _scaled(value: float, factor: float) -> float:
    return math.inf if math.isinf(value) else value * factor
