"""Turns a model, a GPU and a policy into the numbers that the serving loop adds up."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel
from pkvsim.devices.route_options import asked
from pkvsim.models.decode_groups import decode_groups
from pkvsim.models.model_spec import FULL, SLIDING, describe_attention
from pkvsim.models.presets import ModelSpec, decode_weight_bytes, flops_per_token, kv_bytes_per_token, weight_bytes
from pkvsim.options import AttentionOptions
from pkvsim.policy.by_name import POLICIES, policy_routes
from pkvsim.policy.choose import PINNED_ROUTES, make_routing
from pkvsim.policy.fixed import FLASHINFER_ROUTES
from pkvsim.policy.paper import PaperPolicy
from pkvsim.policy.paper_rules import PaperRules
from pkvsim.serving.kv_parallel import check_kv_parallel, exchange_table
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.state import Attention
from pkvsim.shapes import DecodeShape

GIB = 2**30
GRAPH_PLANNED = ("xqa", "balanced")  # read seq_lens on the GPU, so that a captured graph needs no new plan


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
    """KV pages of the whole model, on all GPUs of a server. ValueError where weights and workspace leave none."""
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
        return config.kv_parallel * int(config.kv_gib * GIB // page_bytes)
    left = device.memory_gib * config.memory_fraction * GIB - weight_bytes(model) - config.workspace_gib * GIB
    if left < page_bytes:
        raise ValueError(
            f"model: {model.name} does not fit {device.name}: {weight_bytes(model) / GIB:.1f} GiB of weights and "
            f"{config.workspace_gib:g} of workspace leave no KV page of {config.memory_fraction:g} x "
            f"{device.memory_gib:g} GiB"
        )
    return config.kv_parallel * int(left // page_bytes)


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


def attention_kinds(model: ModelSpec, page_size: int) -> tuple[tuple[DecodeShape, AttentionOptions, int], ...]:
    """(shape, options, layers) of every kind of attention layer that the model has, those that see all tokens last.

    ValueError where a kind is neither full nor sliding grouped-query attention, which no route serves.
    """
    kinds = []
    for group in decode_groups(model, page_size):
        known = group.attention.kind in (FULL, SLIDING) and not group.attention.selected_entries
        if group.shape is None or group.options is None or not known:
            raise ValueError(
                f"model: {model.name}: expected layers of grouped-query attention, full or sliding, got "
                f"{describe_attention(group.attention)}"
            )
        kinds.append((group.shape, group.options, group.count))
    return tuple(sorted(kinds, key=lambda kind: kind[1].window is None))


def paper_rules(device: DeviceSpec) -> PaperRules:
    """The paper's policy on this GPU."""
    return PaperRules(
        min_context=PaperPolicy().min_context,
        beta_gb_s=float(device.beta_gb_s),
        launch_us=float(device.launch_us),
        min_ctas_per_sm=float(device.min_ctas_per_sm),
    )


def attention_costs(model: ModelSpec, device: DeviceSpec, policy: str, config: ServingConfig) -> Attention:
    """Constants of attention. ValueError where the device cannot run the policy, or none of its routes
    serves the model."""
    check_policies([policy])
    models = step_models(device, config)
    kinds = attention_kinds(model, config.page_size)
    if config.kv_parallel > 1:
        check_kv_parallel(policy, kinds)
    paper = paper_rules(device) if policy == "paper" else None
    routings = []
    for shape, options, _ in kinds:
        if paper is not None and asked(shape, options):
            needs = ", ".join(asked(shape, options))
            raise ValueError(f"policies: paper: expected plain attention, {model.name} has layers with {needs}")
        routings.append(
            make_routing(
                shape, models, device, options=options, paper=paper, name=f"policies: {policy}",
                allowed=FLASHINFER_ROUTES if policy == "paper" else policy_routes(policy),
                pinned=dict.fromkeys(PINNED_ROUTES, config.splits),
            )
        )  # fmt: skip
    peak = device.fp16_tflops * config.prefill_attention_efficiency * 1e6  # FLOP per us
    first = routings[0]
    return Attention(
        layers=np.array([layers for *_, layers in kinds]),
        windows=np.array([options.window or 0 for _, options, _ in kinds]),
        heads=np.array([routing.heads for routing in routings], np.float64),
        constants=np.stack([routing.candidates.constants for routing in routings]),
        reaches=np.stack([routing.candidates.reaches for routing in routings]),
        allowed=np.stack([routing.allowed for routing in routings]),
        pinned=first.candidates.pinned,
        unpinned=np.zeros_like(first.candidates.pinned),
        any_pinned=bool(first.candidates.pinned.any()),
        rule=first.rule,
        paper=first.paper,
        paper_routes=np.stack([routing.paper_routes for routing in routings]),
        prefill_us_per_pair=np.array(
            [2 * shape.num_q_heads * (shape.head_dim + options.value_dim(shape)) / peak for shape, options, _ in kinds]
        ),
        prefill_us_per_token=np.array(
            [
                shape.num_kv_heads * options.kv_token_bytes(shape) / (device.beta_gb_s * 1e3)
                for shape, options, _ in kinds
            ]
        ),
        ranks=config.kv_parallel,
        exchange_us=exchange_table(kinds, device, ranks=config.kv_parallel, max_batch=config.max_batch),
    )
