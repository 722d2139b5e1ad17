"""Prices of the very rows and chunks that a server's steps computed, by the functions that whatif prices steps with."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.models.presets import ModelSpec
from pkvsim.outside.step_costs import heated, step_parts
from pkvsim.serving.attention import decode_us
from pkvsim.serving.costs import attention_costs, outside_costs
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of
from pkvsim.serving.state import new_log
from pkvsim.studies.served.steps import ServedStep

POLICY = "balanced"  # the schedule that gpu.serve decodes on


def price_served(
    steps: Sequence[ServedStep], model: ModelSpec, device: DeviceSpec, config: ServingConfig,
    attention_us: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Predicted times in us, float64 [steps], of steps in the order in which they ran. attention_us: of
    served_attention_us, which does not depend on the constants outside attention, where it is known."""
    if attention_us is None:
        attention_us = served_attention_us(steps, model, device, config)
    costs = outside_costs(model, device, POLICY, config)
    log = new_log(config.max_batch, len(ROUTES), limits_of(model, device, config))
    found, heat_us = np.zeros(len(steps)), 0.0
    for at, step in enumerate(steps):
        if not step.follows:
            heat_us = 0.0
        warm = heat_us / costs.boost_us if costs.boost_us > 0 else 1.0
        logits = len(step.decode_lens) + len(step.chunk_begins)
        lens = np.sort(step.decode_lens)[::-1]
        us = step_parts(
            costs, lens, step.chunk_begins, step.chunk_tokens, logits, attention_us[at], warm, log.parts
        )
        found[at] = us if step.follows else us * costs.wake_factor
        heat_us = heated(costs, heat_us, step.tokens, found[at])
    return found


def served_attention_us(
    steps: Sequence[ServedStep], model: ModelSpec, device: DeviceSpec, config: ServingConfig
) -> np.ndarray:
    """Decode attention of all layers, float64 [steps]."""
    attention = attention_costs(model, device, POLICY, config)
    log = new_log(config.max_batch, len(ROUTES), limits_of(model, device, config))
    found = np.zeros(len(steps))
    for at, step in enumerate(steps):
        rows = len(step.decode_lens)
        log.lens[:rows] = np.sort(step.decode_lens)[::-1]
        _, found[at], _ = decode_us(attention, log, rows)
    return found
