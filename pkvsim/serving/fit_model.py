"""A model on one GPU: as it comes where it fits, else with narrower weights."""
from __future__ import annotations

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.presets import ModelSpec, weight_bytes
from pkvsim.models.weight_bits import WEIGHT_BITS, with_weight_bits
from pkvsim.serving.costs import GIB, page_budget
from pkvsim.serving.server_config import ServingConfig

KV_SHARE = 0.25  # of the GPU's memory, that narrowed weights should leave to KV pages


def fit_model(
    model: ModelSpec, device: DeviceSpec, config: ServingConfig, weight_bits: int | None = None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """(model, notes). A model that does not fit as it comes is narrowed unless weight_bits says otherwise: to the
    widest weights that leave KV_SHARE of the memory to KV pages, else the narrowest; a note says so. ValueError where
    the narrowest do not fit either."""
    if weight_bits is not None:
        return with_weight_bits(model, weight_bits), ()
    try:
        page_budget(model, device, config)
        return model, ()
    except ValueError:
        for bits in WEIGHT_BITS[1:]:
            narrow = with_weight_bits(model, bits)
            room = device.memory_gib * (config.memory_fraction - KV_SHARE) - config.profile.workspace_gib
            if weight_bytes(narrow) / GIB <= room:
                break
    page_budget(narrow, device, config)
    note = f"{model.name} does not fit {device.name} as it comes: layer weights in {bits} bits"
    return narrow, (note + " (--weight-bits 16 insists)",)
