"""Sets up the tiers behind a simulated server from its trace, model and GPU."""
from __future__ import annotations

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.model_spec import ModelSpec
from pkvsim.models.presets import kv_bytes_per_token
from pkvsim.serving.prompt_blocks import prompt_blocks
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.state import SERVED, Requests
from pkvsim.serving.tiers.tier_server import PromptPrices, TierServer
from pkvsim.traces.requests import RequestTrace


def start_tiers(
    trace: RequestTrace, model: ModelSpec, device: DeviceSpec, config: ServingConfig, requests: Requests,
    prices: PromptPrices,
) -> TierServer | None:  # fmt: skip
    """None where config has no tiers. ValueError where the trace names no blocks of its prompts, or several servers
    would share the tiers."""
    if config.tiers is None:
        return None
    if config.replicas > 1:
        raise ValueError(f"tier: expected one server, got replicas {config.replicas}")
    if trace.block_hashes is None:
        raise ValueError(f"tier: expected a trace with block hashes, {trace.name} has none")
    blocks = requests.blocks
    if not len(blocks.ids):  # no prefix cache in HBM
        blocks = prompt_blocks(trace, config.page_size, requests.rejected == SERVED)
    return TierServer(
        config.tiers,
        blocks,
        np.asarray(trace.prompt_tokens),
        block_tokens=trace.block_tokens,
        block_bytes=int(np.ceil(kv_bytes_per_token(model) * trace.block_tokens)) * model.tensor_parallel,
        link_bytes_per_s=link_bytes_per_s(model, device, config),
        num_layers=model.num_layers,
        prices=prices,
    )


def link_bytes_per_s(model: ModelSpec, device: DeviceSpec, config: ServingConfig) -> float:
    """From host memory to the model's GPUs, infinity where nobody says."""
    gb_s = None if config.tiers is None else config.tiers.host_link_gb_s
    gb_s = gb_s or device.host_read_gb_s
    return float("inf") if gb_s is None else gb_s * 1e9 * model.tensor_parallel
