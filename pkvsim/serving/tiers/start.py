"""Sets up the tiers behind a simulated server from its trace, model and GPU."""
from __future__ import annotations

from functools import partial

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.model_spec import ModelSpec
from pkvsim.outside.step_costs import StepCosts
from pkvsim.serving.costs import cache_bytes_per_token
from pkvsim.serving.prompt_blocks import prompt_blocks
from pkvsim.serving.scheduling import plan_step
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.state import FOLLOWING, PLANNED, SERVED, Limits, Requests, RunLog, SchedulerState
from pkvsim.serving.tiers.prompt_prices import chunk_table_us, prompt_us
from pkvsim.serving.tiers.tier_server import TierServer
from pkvsim.traces.requests import RequestTrace


def start_tiers(
    trace: RequestTrace, model: ModelSpec, device: DeviceSpec, config: ServingConfig, requests: Requests,
    costs: StepCosts,
) -> TierServer | None:  # fmt: skip
    """None where config has no tiers. ValueError where the trace names no blocks of its prompts."""
    if config.tiers is None:
        return None
    if trace.block_hashes is None:
        raise ValueError(f"tier: expected a trace with block hashes, {trace.name} has none")
    if config.tiers.hold_cost is not None and trace.session is None:
        raise ValueError(f"tier_hold_cost: expected a trace with sessions, {trace.name} has none")
    blocks = requests.blocks
    if not len(blocks.ids):  # no prefix cache in HBM
        blocks = prompt_blocks(trace, config.page_size, requests.rejected == SERVED)
    return TierServer(
        config.tiers,
        blocks,
        np.asarray(trace.prompt_tokens),
        block_tokens=trace.block_tokens,
        block_bytes=block_bytes(trace, model, config),
        link_bytes_per_s=link_bytes_per_s(model, device, config),
        num_layers=model.num_layers,
        sessions=None if trace.session is None else np.asarray(trace.session),
        prices=partial(prompt_us, costs, chunk_table_us(costs, config.step_tokens)),
    )


def answer_all(server: TierServer, requests: Requests, limits: Limits, state: SchedulerState, log: RunLog) -> bool:
    """Answers the request that asks, if one does, and those that ask next as a step is planned again that is to follow
    the running one; the loop plans all others itself. Whether one asked."""
    asked = False
    while server.answer(state):
        asked = True
        if log.counts[PLANNED]:
            log.counts[FOLLOWING] = plan_step(requests, limits, state, float(state.gate.asked_us[0]))
    return asked


def block_bytes(trace: RequestTrace, model: ModelSpec, config: ServingConfig) -> int:
    """Of a block of the trace in all layers of all the model's GPUs."""
    return int(np.ceil(cache_bytes_per_token(model, config) * trace.block_tokens)) * model.tensor_parallel


def link_bytes_per_s(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> float:
    """From host memory to the server's GPUs, each of which holds its part of every block; infinity where nobody
    says."""
    gb_s = None if config.tiers is None else config.tiers.host_link_gb_s
    gb_s = gb_s or device.host_read_gb_s
    return float("inf") if gb_s is None else gb_s * 1e9 * model.tensor_parallel * config.kv_parallel
