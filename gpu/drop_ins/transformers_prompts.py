"""What a block of a Transformers model is, and which of its prompts have blocks that are equal."""
from __future__ import annotations

import json

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gpu.cache.prompts.fingerprint import fingerprint

UNRELATED = ("transformers_version", "_name_or_path")  # of a configuration: what KV does not depend on
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings whose angles depend on the whole sequence


def contents_of(model: PreTrainedModel, page_size: int) -> str:
    """What a block of this model is: its configuration, type, page size and a fingerprint of its weights as they are
    now. What a directory holds of anything else is refused; weights that change later, by training or by another
    adapter, are those of another pool."""
    config = {name: value for name, value in json.loads(model.config.to_json_string()).items() if name not in UNRELATED}
    digest = fingerprint(config, model.state_dict().items())
    name = type(model).__name__
    return f"{name} {str(model.dtype).removeprefix('torch.')} page {page_size} {digest}"


def check_positions(config: PreTrainedConfig) -> None:
    """NotImplementedError where KV of a token depends on the length of its sequence."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    every = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for one in every:
        kind = one.get("rope_type", one.get("type"))
        if kind in LENGTH_DEPENDENT:
            raise NotImplementedError(f"tiers: expected rotary embeddings by a token's place alone, got {kind}")


def row_tokens(ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens without padding; ids [batch_size, tokens], mask [batch_size, tokens] or None."""
    if mask is None:
        return ids.tolist()
    return [[token for token, kept in zip(*row) if kept] for row in zip(ids.tolist(), mask.tolist())]
