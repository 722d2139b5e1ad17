"""Continuous batching of a request trace on one GPU: what a policy does to latency and throughput.

One step computes a token of every decoding request and chunks of prompts up to step_tokens, as vLLM's scheduler
does. Its time is the sum of two parts: decode attention on the route the policy picked, priced by the lengths in the
batch (pkvsim.policy.choose), or by the engine's own kernel; and all the rest of the step (pkvsim.outside): matrix
products, prefill attention, small kernels, all-reduces and the host. Requests are admitted in config.order once there
are the pages that the engine asks for (its profile); when a request finds no page, the last in that order is
recomputed later.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.memory.prefix_cache import KINDS, PromptBlocks, no_blocks
from pkvsim.models.presets import ModelSpec
from pkvsim.outside.engine_profile import CHUNK
from pkvsim.serving.costs import attention_costs, draft_cost, outside_costs, page_budget, state_pages
from pkvsim.serving.loop import advance
from pkvsim.serving.orders import ORDERS, ranks
from pkvsim.serving.prompt_blocks import prompt_blocks
from pkvsim.serving.replicas import serve_replicas
from pkvsim.serving.results.result import ServingResult, make_result, with_tiers
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.shared.grouping import block_places
from pkvsim.serving.state import (
    SERVED,
    TOO_LONG_FOR_MODEL,
    TOO_LONG_FOR_POOL,
    Limits,
    Requests,
    new_log,
    new_scheduler_state,
)
from pkvsim.serving.tiers.start import answer_all, start_tiers
from pkvsim.traces.requests import RequestTrace

CHUNK_STEPS = 20_000  # steps between two reports of progress
Progress = Callable[[int, int], None]  # output tokens produced, of how many


def simulate(
    trace: RequestTrace,
    model: ModelSpec,
    device: DeviceSpec,
    policy: str,
    config: ServingConfig = ServingConfig(),
    *,
    cached: np.ndarray | None = None,
    progress: Progress | None = None,
) -> ServingResult:
    """Serves the whole trace. policy: of pkvsim.policy.by_name.POLICIES. cached [n] int64: tokens of each prompt whose
    KV comes with its request. ValueError where the model does not fit."""
    limits = limits_of(model, device, config)
    requests = requests_of(trace, model, config, limits)
    if cached is not None:
        requests = requests._replace(remote=cached)
    attention = attention_costs(model, device, policy, config)
    costs = outside_costs(model, device, policy, config)
    states = [new_scheduler_state(requests, limits) for _ in range(config.replicas)]
    states = [state._replace(clients=states[0].clients) for state in states]
    logs = [new_log(len(trace), len(ROUTES), limits) for _ in states]
    total = int(trace.output_tokens[requests.rejected == SERVED].sum())

    def report() -> None:
        if progress is not None:
            progress(sum(int(state.generated.sum()) for state in states), total)

    if config.replicas > 1:
        if config.tiers is not None:
            raise ValueError(f"tier: expected one server, got replicas {config.replicas}")
        owner = serve_replicas(trace, requests, limits, attention, costs, config, states, logs, report)
        return make_result(policy, requests, limits, states, logs, owner)
    tiers = start_tiers(trace, model, device, config, requests, costs)
    done = False
    while not done:
        done = advance(
            requests, limits, attention, costs, config.profile.steps_in_flight, states[0], logs[0], CHUNK_STEPS,
            np.inf, np.inf, True,
        )  # fmt: skip
        if tiers is None or not answer_all(tiers, requests, limits, states[0], logs[0]):
            report()
    result = make_result(policy, requests, limits, states, logs, np.zeros(len(trace), np.int64))
    return result if tiers is None else with_tiers(result, tiers.setup, tiers.finish(states[0]))


def limits_of(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> Limits:
    """The scheduler's numbers. ValueError where the model does not fit."""
    num_pages, profile = page_budget(model, device, config), config.profile
    return Limits(
        page_size=config.page_size,
        num_pages=num_pages,
        keep_free=int(num_pages * profile.keep_free_fraction),
        max_batch=config.max_batch,
        step_tokens=config.step_tokens,
        cache_kind=KINDS.index(config.prefix_cache),
        order=ORDERS.index(config.order),
        hold_us=config.kv_ttl_s * 1e6 if config.order == "continuum" else 0.0,
        tiers=config.tiers is not None,
        by_chunk=profile.admission == CHUNK,
        reserve_output=float(profile.reserve_output),
        mixes=profile.mixes,
        query_tokens=config.query_tokens,
        acceptance=float(config.acceptance or 0.0),
        draft_cost=float(draft_cost(model, config).part),
        draft_seed=config.draft_seed,
        state_pages=state_pages(model, config),
    )


def requests_of(trace: RequestTrace, model: ModelSpec, config: ServingConfig, limits: Limits) -> Requests:
    """The trace as the scheduler takes it, arrivals from the first on. ValueError where no request can be served."""
    if config.order == "kvshare" and config.prefix_cache == "none":
        raise ValueError("order: kvshare orders by what a prefix cache holds, expected --prefix-cache with it")
    rejected = refusals(trace, model, config, limits.num_pages - limits.state_pages)
    if rejected.all():
        raise ValueError(
            f"{trace.name}: expected a request that fits the KV pool of {limits.num_pages * config.page_size:,} tokens "
            f"and {model.name}'s context of {model.max_context:,}, the shortest has "
            f"{int((trace.prompt_tokens + trace.output_tokens).min()):,}"
        )
    blocks = _blocks(trace, config, rejected == SERVED)
    requests = Requests(
        arrival_us=(trace.arrival_s - trace.arrival_s[0]) * 1e6,
        prompt=trace.prompt_tokens,
        output=trace.output_tokens,
        rejected=rejected,
        blocks=blocks,
        shared=np.where(np.diff(blocks.offsets) > 0, trace.prompt_tokens, 0),
        after=np.zeros(0, np.int32) if trace.after is None else trace.after,
        think_us=np.zeros(0) if trace.think_us is None else trace.think_us,
        concurrency=trace.concurrency or 0,
        rank=ranks(trace, config.order),
        queue_us=config.profile.queue_ms * 1e3,
        output_us=config.profile.output_ms * 1e3,
    )
    if config.shares_reads:
        requests = requests._replace(
            block_tokens=int(trace.block_tokens),
            block_places=block_places(blocks, trace.prompt_tokens, trace.block_tokens),
        )
    return requests


def _blocks(trace: RequestTrace, config: ServingConfig, served: np.ndarray) -> PromptBlocks:
    if config.prefix_cache == "none":
        return no_blocks(len(trace))
    if trace.block_hashes is None:
        raise ValueError(f"prefix_cache: {config.prefix_cache} needs a trace with block hashes, {trace.name} has none")
    if trace.block_tokens % config.page_size:
        raise ValueError(
            f"page_size: expected a divisor of the trace's blocks of {trace.block_tokens} tokens, "
            f"got {config.page_size}"
        )
    return prompt_blocks(trace, config.page_size, served)


def refusals(trace: RequestTrace, model: ModelSpec, config: ServingConfig, num_pages: int) -> np.ndarray:
    """Why a request cannot be served, int8 [n]: SERVED, TOO_LONG_FOR_POOL or TOO_LONG_FOR_MODEL."""
    cached = trace.prompt_tokens + trace.output_tokens - 1  # the last token is never cached
    pages = -(-cached // config.page_size)
    # Generated tokens start on a page of their own, as a prompt's pages may be shared.
    if config.prefix_cache != "none":
        pages = -(-trace.prompt_tokens // config.page_size) + -(-(trace.output_tokens - 1) // config.page_size)
    reasons = np.where(pages > num_pages, TOO_LONG_FOR_POOL, SERVED)
    return np.where(cached + 1 > model.max_context, TOO_LONG_FOR_MODEL, reasons).astype(np.int8)
