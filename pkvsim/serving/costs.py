"""Turns a model, a GPU and a policy into the numbers that the serving loop adds up."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import RouteModel
from pkvsim.models.presets import ModelSpec, decode_weight_bytes, flops_per_token, kv_bytes_per_token, weight_bytes
from pkvsim.policy.paper import PaperPolicy
from pkvsim.policy.paper_rules import PaperRules
from pkvsim.pricing.counters import KV_ELEMENT_BYTES, PLAN, ROUTES, constants_matrix
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.state import CHEAPEST, PAPER, Attention

GIB = 2**30
FLASHINFER_ROUTES = ("flashinfer_cuda_core", "flashinfer_tensor_core")
POLICY_ROUTES = {"calibrated": ROUTES, "oracle": ROUTES, "flashinfer": FLASHINFER_ROUTES}
GRAPH_PLANNED = ("xqa", "balanced")  # read seq_lens on the GPU, so that a captured graph needs no new plan
POLICIES = ("paper", *POLICY_ROUTES, *ROUTES)


def check_policies(policies: Sequence[str]) -> None:
    """ValueError unless there is a policy, every one is known and none comes twice."""
    if not policies:
        raise ValueError("policies: expected at least one")
    for name in policies:
        if name not in POLICIES:
            raise ValueError(f"policies: expected names of {', '.join(POLICIES)}, got {name!r}")
    if len(set(policies)) < len(policies):
        raise ValueError(f"policies: expected each once, got {', '.join(policies)}")


def fit_note(device: DeviceSpec) -> str:
    """How far the device's prices are from measurements, in words."""
    errors = [
        error.mean_percent
        for entry in device.calibration.values()
        if (error := entry.held_out or entry.in_sample) is not None and entry.status == "calibrated"
    ]
    if not errors:
        return "datasheet only, no measurement behind them"
    return f"fit error {np.mean(errors):.1f} % ({len(errors)} of {len(ROUTES)} routes calibrated)"


def page_budget(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> int:
    """KV pages of the whole model. ValueError where weights and workspace leave none."""
    page_bytes = kv_bytes_per_token(model) * config.page_size
    if config.kv_gib is not None:
        if config.kv_gib * GIB < page_bytes:
            raise ValueError(f"kv_gib: expected at least one page of {page_bytes / GIB:.3g} GiB, got {config.kv_gib:g}")
        room = device.memory_gib * GIB - weight_bytes(model)
        if config.kv_gib * GIB > room:
            raise ValueError(
                f"kv_gib: expected at most the {max(0.0, room / GIB):.1f} GiB that the weights of {model.name} leave "
                f"of the {device.memory_gib:g} of {device.name}, got {config.kv_gib:g}"
            )
        return int(config.kv_gib * GIB // page_bytes)
    left = device.memory_gib * config.memory_fraction * GIB - weight_bytes(model) - config.workspace_gib * GIB
    if left < page_bytes:
        raise ValueError(
            f"model: {model.name} does not fit {device.name}: {weight_bytes(model) / GIB:.1f} GiB of weights and "
            f"{config.workspace_gib:g} of workspace leave no KV page of {config.memory_fraction:g} x "
            f"{device.memory_gib:g} GiB"
        )
    return int(left // page_bytes)


def linear_table_us(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> np.ndarray:
    """Time of the layers without attention, by tokens in the step: float64 [step_tokens + 1], 0 for none.

    The larger of reading the weights once and of the matrix products' FLOPs at compute_efficiency of the peak; the
    LM head counts for at most max_batch tokens, as a prompt needs it for its last token only.
    """
    tokens = np.arange(1, config.step_tokens + 1)
    read_us = decode_weight_bytes(model, tokens) / (device.beta_gb_s * 1e3)
    layers = flops_per_token(model, lm_head=False)
    flops = tokens * layers + np.minimum(tokens, config.max_batch) * (flops_per_token(model) - layers)
    return np.append(0.0, np.maximum(read_us, flops / (device.fp16_tflops * config.compute_efficiency * 1e6)))


def step_models(device: DeviceSpec, config: ServingConfig) -> dict[str, RouteModel]:
    """The device's routes as the server runs them, by name.

    A captured graph issues no layer and waits for nothing but the host's planning, and has none where a route plans on
    the GPU (balanced) or has nothing to plan (XQA).
    """
    models = device_routes(device)
    if not config.graphs:
        return models
    no_plan: dict[str, Any] = {"plan_us": 0.0, "plan_row_us": 0.0, "plan_length_us": 0.0}
    return {
        name: replace(model, host_us=0.0, run_us=0.0, **(no_plan if name in GRAPH_PLANNED else {}))
        for name, model in models.items()
    }


def attention_costs(model: ModelSpec, device: DeviceSpec, policy: str, config: ServingConfig) -> Attention:
    """Constants of attention. ValueError where the device cannot run the policy."""
    check_policies([policy])
    constants = constants_matrix(step_models(device, config))
    known = ~np.isnan(constants[:, PLAN])
    names = POLICY_ROUTES.get(policy, FLASHINFER_ROUTES if policy == "paper" else (policy,))
    allowed = known & np.isin(ROUTES, names)
    if not allowed.any():
        raise ValueError(f"policies: {device.name} has no model of a route for {policy}")
    tensor_core, cuda_core, split, workqueue = (
        ROUTES.index(name) for name in ("flashinfer_tensor_core", "flashinfer_cuda_core", "split", "workqueue")
    )
    peak = device.fp16_tflops * config.prefill_attention_efficiency * 1e6  # FLOP per us
    return Attention(
        layers=np.array([model.num_full_layers, model.num_sliding_layers]),
        window=model.sliding_window,
        num_kv_heads=model.num_kv_heads,
        group_size=model.num_q_heads // model.num_kv_heads,
        head_dim=model.head_dim,
        kv_element_bytes=KV_ELEMENT_BYTES,
        num_sms=device.num_sms,
        constants=constants,
        rule=PAPER if policy == "paper" else CHEAPEST,
        allowed=allowed,
        pinned=config.splits or 0,
        paper=PaperRules(
            min_context=PaperPolicy().min_context,
            beta_gb_s=float(device.beta_gb_s),
            launch_us=float(device.launch_us),
            min_ctas_per_sm=float(device.min_ctas_per_sm),
        ),
        paper_routes=np.array([tensor_core if known[tensor_core] else cuda_core, split, workqueue]),
        prefill_us_per_pair=4 * model.num_q_heads * model.head_dim / peak,
        prefill_us_per_token=kv_bytes_per_token(model) / model.num_layers / (device.beta_gb_s * 1e3),
    )
