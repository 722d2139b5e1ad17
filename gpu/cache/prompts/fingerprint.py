"""Which model computed blocks: those of equal keys are equal KV where their models have equal fingerprints."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SAMPLED = 64  # elements of every parameter that tell one model's weights from another's


def fingerprint(config: Mapping[str, Any], weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of a model: its configuration, what JSON can say, and its weights by their names as they are now."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for name, weight in weights:
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        if len(flat):
            step = max(1, len(flat) // SAMPLED)
            digest.update(flat[::step][:SAMPLED].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
