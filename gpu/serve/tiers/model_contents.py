"""What a served model's blocks are, so that no directory gives them to another model."""
from __future__ import annotations

from gpu.drop_ins.prompts.block_keys import fingerprint
from gpu.serve.attention import KVPages
from gpu.serve.model.config import ModelConfig
from gpu.serve.model.weights import Weights


def model_contents(config: ModelConfig, weights: Weights, pages: KVPages) -> str:
    """Its name, its pages' type and size, and a fingerprint of its configuration and weights."""
    named = ((str(at), weight) for at, weight in enumerate(weights.tensors()))
    return f"gpu.serve {config.name} {pages.dtype} page {pages.page_size} {fingerprint(config.source, named)}"
