"""Names of blocks: equal keys are equal KV, in this process and in any later one."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

UNRELATED = ("transformers_version", "_name_or_path")  # of a configuration: what KV does not depend on
SAMPLED = 64  # elements of every parameter that tell one model's weights from another's
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings whose angles depend on the whole sequence


def block_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each whole block of page_size tokens from the prompt's start, SHA-256 over all tokens up to its end."""
    ids = np.asarray(tokens, np.int64)
    digest, keys = hashlib.sha256(), []
    for begin in range(0, len(ids) // page_size * page_size, page_size):
        digest.update(ids[begin : begin + page_size].tobytes())
        keys.append(digest.digest())
    return keys


def contents_of(model: PreTrainedModel, page_size: int) -> str:
    """What a block of this model is: its configuration, type, page size and a fingerprint of its weights as they are
    now. What a directory holds of anything else is refused; weights that change later, by training or by another
    adapter, are those of another pool."""
    config = {name: value for name, value in json.loads(model.config.to_json_string()).items() if name not in UNRELATED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        if len(flat):
            step = max(1, len(flat) // SAMPLED)
            digest.update(flat[::step][:SAMPLED].double().cpu().numpy().tobytes())
    name = type(model).__name__
    return f"{name} {str(model.dtype).removeprefix('torch.')} page {page_size} {digest.hexdigest()[:32]}"


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
