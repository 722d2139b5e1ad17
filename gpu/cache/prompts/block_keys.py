"""Names of blocks: equal keys are equal KV, in this process and in any later one, of models of equal fingerprints."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SAMPLED = 64  # elements of every parameter that tell one model's weights from another's


def block_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each whole block of page_size tokens from the prompt's start, SHA-256 over all tokens up to its end."""
    ids = np.asarray(tokens, np.int64)
    digest, keys = hashlib.sha256(), []
    for begin in range(0, len(ids) // page_size * page_size, page_size):
        digest.update(ids[begin : begin + page_size].tobytes())
        keys.append(digest.digest())
    return keys


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
