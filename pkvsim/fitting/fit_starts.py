"""Where fits start: the ways a route may cut rows, first values from a GPU's own numbers, and which constants move."""
from __future__ import annotations

import math

from pkvsim.devices.derive import merging_warps
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel
from pkvsim.schedule.costs import default_costs

TENSOR_CORE_ROWS = 16  # of an mma tile: heads of a group are padded to it
MIB_IN_MB = 2**20 / 1e6
_RULES = {  # by route: rule, CTA slots per SM to try, padding of the group, tile
    "flashinfer_cuda_core": ("chunk", (2, 3, 4, 5, 6, 7, 8), 1, 16),
    "flashinfer_tensor_core": ("chunk", (1, 2, 3), TENSOR_CORE_ROWS, 16),
    "xqa": ("even", (1, 2), TENSOR_CORE_ROWS, 16),
    "split": ("buckets", (1,), 8, 32),
    "workqueue": ("queue", (1,), 8, 32),
    "balanced": ("balanced", (1,), 8, 16),
}
_STRIDED = ("split", "workqueue")  # the engine launches one CTA on each SM at most
_FREE = {
    "flashinfer_cuda_core": ("task_us", "sm_heads_gb_s", "base_heads"),
    "flashinfer_tensor_core": ("merge_us", "merge_split_us"),
    "xqa": ("merge_us", "merge_split_us"),
    "split": ("launch_us", "task_us", "merge_us", "merge_split_us", "sm_heads_gb_s"),
    "workqueue": ("launch_us", "task_us", "merge_us", "merge_split_us", "sm_heads_gb_s"),
    "balanced": ("segment_us", "merge_us", "merge_gb_s", "sm_heads_gb_s", "base_heads"),
}
PEER_RULES = ("whole", "even", "chunk")  # tried for a system whose scheduling is not known
PEER_SLOTS = (1, 2, 4, 8)
PEER_LEAST_SPLITS = (128, 1024)  # tokens
_PEER_FREE = ("task_us", "merge_us", "merge_split_us", "l2_gb_s", "l2_mb")


def free_constants(route: str) -> tuple[str, ...]:
    """Names of the constants that a fit of this route moves."""
    return ("bandwidth_gb_s", "cta_read_gb_s", "fixed_us", *_FREE.get(route, _PEER_FREE))


def fit_starts(route: str, device: DeviceSpec, *, from_known: bool = False) -> list[RouteModel]:
    """Candidates for a fit of `route` on `device`, one for each way it may cut rows.

    A name that is not one of ROUTES is another system's: its rule and slots are searched, and its small steps are taken
    to find their KV in L2, as benchmarks that repeat one call do. from_known: start from the device's own model of the
    route instead, so that what is not fitted stays as it is; ValueError where it has none.
    """
    if from_known:
        if route not in device.routes:
            raise ValueError(f"device_base: expected a model of {route} in {device.name} to start from")
        return [device.routes[route]]
    common = dict(
        bandwidth_gb_s=device.beta_gb_s,
        cta_read_gb_s=min(50.0, device.beta_gb_s / 4),
        fixed_us=5.0,
        launch_us=3.0,
        merge_us=2.0,
        merge_split_us=0.05,
        task_us=1.5,
    )
    if route in ROUTES:
        rule, slots, pad, tile = _RULES[route]
        own = {}
        if route == "flashinfer_cuda_core":
            own = {"sm_heads_gb_s": 130.0, "base_heads": 1.3, "merge_us": 0.0, "merge_split_us": 0.0}
        if rule == "balanced":
            own = {
                "segment_us": 1.0, "merge_gb_s": 20.0, "sm_heads_gb_s": 800.0, "base_heads": 3.0,
                "task_us": 0.0, "launch_us": 0.0, "merge_split_us": 0.0,
            }  # fmt: skip
        if route in _STRIDED:
            own = {
                "strided": 1.0, "launch_us": 1.0, "merge_split_us": 0.1, "sm_heads_gb_s": 1500.0,
                "merge_columns": float(merging_warps(device.compute_capability)),
            }  # fmt: skip
        return [
            RouteModel(
                rule=rule, ctas_per_sm=count, head_pad=pad, tile_tokens=tile,
                costs=default_costs(device.compute_capability), **common | own,
            )
            for count in slots  # fmt: skip
        ]
    l2 = dict(l2_gb_s=3 * device.beta_gb_s, l2_mb=device.l2_mib * MIB_IN_MB / 2)
    pad = 1 if route.endswith("/mha") else TENSOR_CORE_ROWS
    return [
        RouteModel(
            rule=rule, ctas_per_sm=count, head_pad=pad, min_split_tokens=least, sm_heads_gb_s=math.inf,
            **common | l2,  # type: ignore[arg-type]
        )
        for rule in PEER_RULES
        for count in PEER_SLOTS
        for least in PEER_LEAST_SPLITS
    ]
