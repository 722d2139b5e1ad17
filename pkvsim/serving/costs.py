"""Turns a model, a GPU and a policy into the numbers that the serving loop adds up."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES, RouteModel
from pkvsim.devices.route_options import asked
from pkvsim.models.decode_groups import DecodeGroup, decode_groups
from pkvsim.models.model_costs import KV_ELEMENT_BYTES, active_weights, mtp_weights, state_bytes
from pkvsim.models.model_spec import CHUNKED, FULL, describe_attention
from pkvsim.models.presets import ModelSpec, kv_bytes_per_token, weight_bytes
from pkvsim.options import AttentionOptions
from pkvsim.outside.derive import outside_entry
from pkvsim.outside.engine_profile import EngineProfile
from pkvsim.outside.pairs import KIND_CODES
from pkvsim.outside.step_costs import UNBOUNDED, StepCosts, step_costs
from pkvsim.policy.by_name import POLICIES, policy_routes
from pkvsim.policy.choose import CHEAPEST, NO_PAPER, PINNED_ROUTES, make_routing
from pkvsim.policy.fixed import FLASHINFER_ROUTES
from pkvsim.policy.paper import PaperPolicy
from pkvsim.policy.paper_rules import PaperRules
from pkvsim.pricing.kv_parallel import POLICY, check_kv_parallel, exchange_table
from pkvsim.pricing.layer import Heads
from pkvsim.serving.selection.memory import summary_page_bytes
from pkvsim.serving.selection.pages import make_selecting
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.shared.share import make_sharing
from pkvsim.serving.state import Attention
from pkvsim.shapes import DecodeShape

GIB = 2**30
ENGINE = "engine"  # the policy that takes the engine's own decode attention
OUR_POLICIES = ("paper", "calibrated", "flashinfer", "workqueue", "balanced", "oracle")  # shown side by side
GRAPH_PLANNED = ("xqa", "balanced")  # read seq_lens on the GPU, so that a captured graph needs no new plan


def check_policies(policies: Sequence[str]) -> None:
    """ValueError unless there is a policy, every one is known and none comes twice."""
    if not policies:
        raise ValueError("policies: expected at least one")
    for name in policies:
        if name not in (*POLICIES, ENGINE):
            raise ValueError(f"policies: expected names of {', '.join((*POLICIES, ENGINE))}, got {name!r}")
    if len(set(policies)) < len(policies):
        raise ValueError(f"policies: expected each once, got {', '.join(policies)}")


def default_policies(config: ServingConfig) -> tuple[str, ...]:
    """What is compared where nobody says: an engine's own attention, or our routes side by side, of which one serves
    several GPUs."""
    if config.kv_parallel > 1:
        return (POLICY,)
    return (ENGINE,) if config.profile.attention == "flash" else OUR_POLICIES


def default_policy(config: ServingConfig) -> str:
    """The one policy where nobody says."""
    return ENGINE if config.profile.attention == "flash" else "calibrated"


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


def cache_bytes_per_token(model: ModelSpec, config: ServingConfig) -> float:
    """KV cache of one token over all layers of one GPU, scales of 8-bit types included."""
    if config.kv_dtype is None:
        return kv_bytes_per_token(model)
    total = 0.0
    for group in decode_groups(model, config.page_size, kv_dtype=config.kv_dtype):
        if group.shape is not None and group.options is not None:
            total += group.count * group.shape.num_kv_heads * group.options.kv_token_bytes(group.shape)
        else:
            total += group.count * group.attention.bytes_per_token(1)
    return total


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What drafting one token for all rows takes, as a part of their step without drafts, and how that is known."""

    part: float
    basis: str  # of pkvsim.studies.provenance.BASES
    source: str
    weight_bytes: float = 0.0  # loaded for it on one GPU


def draft_cost(model: ModelSpec, config: ServingConfig) -> DraftCost:
    """As it is given, or by the bytes of one prediction head and the LM head beside those of a token's way through the
    model, which is what bounds small batches; nothing where the model has no heads, as with prompt lookup."""
    if config.query_tokens == 1:
        return DraftCost(0.0, "computed", "no drafts")
    loaded = mtp_weights(model).bytes if model.mtp_layers else 0.0
    if config.draft_cost is not None:
        return DraftCost(config.draft_cost, "assumed", "given")
    if not model.mtp_layers:
        return DraftCost(0.0, "assumed", "no prediction heads and no cost given: drafts for nothing, as prompt lookup")
    head = loaded / len(model.mtp_layers) + model.lm_head.bytes
    return DraftCost(
        head / active_weights(model).bytes, "assumed",
        "bytes of a prediction head, all its experts, and the LM head over those that a token passes through", loaded,
    )  # fmt: skip


def state_pages(model: ModelSpec, config: ServingConfig) -> int:
    """KV pages that the recurrent and convolution states of a running request take the room of."""
    page_bytes = cache_bytes_per_token(model, config) * config.page_size
    return int(-(-state_bytes(model) // page_bytes)) if page_bytes else 0


def page_budget(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> int:
    """KV pages of the whole model, summaries beside them where pages are selected, on all GPUs of a server. ValueError
    where weights and workspace leave none."""
    page_bytes = cache_bytes_per_token(model, config) * config.page_size
    page_bytes += summary_page_bytes(model, config.page_size, config.select)
    if not page_bytes:
        raise ValueError(f"model: {model.name}: expected layers that cache keys and values, got none")
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
    weights = weight_bytes(model) + draft_cost(model, config).weight_bytes
    left = device.memory_gib * config.memory_fraction * GIB - weights - config.profile.workspace_gib * GIB
    if left < page_bytes:
        raise ValueError(
            f"model: {model.name} does not fit {device.name}: {weights / GIB:.1f} GiB of weights and "
            f"{config.profile.workspace_gib:g} of workspace leave no KV page of {config.memory_fraction:g} x "
            f"{device.memory_gib:g} GiB"
        )
    return config.kv_parallel * int(left // page_bytes)


def server_profile(config: ServingConfig, policy: str) -> EngineProfile:
    """The engine, with attention of its own under the policy ENGINE, by our routes under every other. ValueError where
    it has none of its own."""
    profile = config.profile
    if policy != ENGINE:
        return replace(profile, attention="policy")
    if profile.attention != "flash":
        raise ValueError(f"policies: {ENGINE}: expected an engine with attention of its own, got {profile.name}")
    return profile


def outside_costs(model: ModelSpec, device: DeviceSpec, policy: str, config: ServingConfig) -> StepCosts:
    """What a step costs beside the decode attention that the policy routes. ValueError where the GPU has no rate of the
    model's products."""
    profile = server_profile(config, policy)
    most = max((size for size in profile.graph_sizes if size <= 2 * config.step_tokens), default=0)
    return step_costs(
        model, device, outside_entry(device, profile.constants).constants, profile,
        step_tokens=max(config.step_tokens, most), max_batch=config.max_batch, query_tokens=config.query_tokens,
        kv_element_bytes=KV_ELEMENT_BYTES if config.kv_dtype is None else 1,
    )  # fmt: skip


def step_models(device: DeviceSpec, config: ServingConfig) -> dict[str, RouteModel]:
    """The device's routes as the server runs them, by name.

    A captured graph issues no layer and waits for nothing but the host's planning, and has none where a route plans on
    the GPU (balanced) or has nothing to plan (XQA).
    """
    models = device_routes(device)
    if not config.profile.graph_sizes:
        return models
    no_plan: dict[str, Any] = {"plan_us": 0.0, "plan_row_us": 0.0, "plan_length_us": 0.0}
    return {
        name: replace(model, host_us=0.0, run_us=0.0, **(no_plan if name in GRAPH_PLANNED else {}))
        for name, model in models.items()
    }


def attention_kinds(
    model: ModelSpec, page_size: int, kv_dtype: str | None = None, query_tokens: int = 1
) -> tuple[tuple[DecodeShape, AttentionOptions, int], ...]:
    """(shape, options, layers) of every kind of attention layer that routes serve, those that see all tokens last."""
    return tuple((*_kernel(group), group.count) for group in routed_groups(model, page_size, kv_dtype, query_tokens))


def routed_groups(
    model: ModelSpec, page_size: int, kv_dtype: str | None = None, query_tokens: int = 1
) -> tuple[DecodeGroup, ...]:
    """The kinds of layers that routes serve, grouped-query attention, those that see all tokens last; what the others
    (latent, compressed, state) cost is pkvsim.outside's matter."""
    groups = [
        group for group in decode_groups(model, page_size, kv_dtype=kv_dtype, query_tokens=query_tokens)
        if group.shape is not None
    ]  # fmt: skip
    return tuple(sorted(groups, key=lambda group: (group.attention.kind == FULL, not group.attention.window)))


def _kernel(group: DecodeGroup) -> tuple[DecodeShape, AttentionOptions]:
    if group.shape is None or group.options is None:
        raise ValueError(f"attention: expected a kind that kernels serve, got {describe_attention(group.attention)}")
    return group.shape, group.options


def paper_rules(device: DeviceSpec) -> PaperRules:
    """The paper's policy on this GPU."""
    return PaperRules(
        min_context=PaperPolicy().min_context,
        beta_gb_s=float(device.beta_gb_s),
        launch_us=float(device.launch_us),
        min_ctas_per_sm=float(device.min_ctas_per_sm),
    )


def attention_costs(model: ModelSpec, device: DeviceSpec, policy: str, config: ServingConfig) -> Attention:
    """Constants of the decode attention that a policy routes: none under ENGINE. ValueError where the device cannot run
    the policy, or none of its routes serves the model."""
    check_policies([policy])
    profile = server_profile(config, policy)
    groups: tuple[DecodeGroup, ...] = ()
    if profile.attention != "flash":
        groups = routed_groups(model, config.page_size, config.kv_dtype, config.query_tokens)
    if config.kv_parallel > 1:
        check_kv_parallel(policy, groups)
    models = step_models(device, config)
    paper = paper_rules(device) if policy == "paper" else None
    routings = []
    for shape, options in map(_kernel, groups):
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
    kinds, routes = len(routings), len(ROUTES)
    constants = [routing.candidates.constants for routing in routings]
    width = constants[0].shape[1] if constants else 1
    pinned = routings[0].candidates.pinned if routings else np.zeros(routes, np.int64)
    reads = [(KIND_CODES[g.attention.kind], g.attention.window or UNBOUNDED, g.attention.selected_entries,
              g.attention.tokens_per_entry) for g in groups]  # fmt: skip
    return Attention(
        layers=np.array([group.count for group in groups], np.int64),
        reads=np.array(reads, np.int64).reshape(kinds, 4),
        whole=np.array([g.attention.kind != CHUNKED and not g.attention.selected_entries for g in groups], bool),
        heads=np.array([routing.heads for routing in routings], np.float64).reshape(kinds, len(Heads._fields)),
        constants=np.array(constants, np.float64).reshape(kinds, routes, width),
        reaches=np.array([routing.candidates.reaches for routing in routings], np.int64).reshape(kinds, routes),
        allowed=np.array([routing.allowed for routing in routings], bool).reshape(kinds, routes),
        pinned=pinned,
        unpinned=np.zeros_like(pinned),
        any_pinned=bool(pinned.any()),
        rule=routings[0].rule if routings else CHEAPEST,
        paper=NO_PAPER if paper is None else paper,
        paper_routes=np.array([routing.paper_routes for routing in routings], np.int64).reshape(kinds, 3),
        ranks=config.kv_parallel,
        exchange_us=exchange_table(groups, device, ranks=config.kv_parallel, max_batch=config.max_batch),
        sharing=make_sharing(groups, models.get("balanced"), device, share=config.shares_reads),
        selecting=make_selecting(groups, device, config.select, graphs=bool(profile.graph_sizes)),
    )
