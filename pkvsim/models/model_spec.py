"""A model as one GPU sees it: the bytes and FLOPs of a decode or prefill step, by weights and attention."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.shapes import DecodeShape

KV_ELEMENT_BYTES = 2  # FP16 or BF16 caches


@dataclass(frozen=True, slots=True)
class Weights:
    """A group of weights on one GPU: how many, how large, and FLOPs per token through its matrices."""

    parameters: int = 0
    bytes: float = 0.0
    flops: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.parameters + other.parameters, self.bytes + other.bytes, self.flops + other.flops
        )

    def times(self, count: float) -> Weights:
        """`count` such groups."""
        return Weights(round(self.parameters * count), self.bytes * count, round(self.flops * count))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model on one of tensor_parallel GPUs: heads and weights are this GPU's share. All layers are alike,
    but for num_sliding_layers of them that attend to the last sliding_window tokens only."""

    name: str
    source: str  # the config that every number follows from
    tensor_parallel: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int  # tokens
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int  # tokens; 0 without sliding layers
    num_sliding_layers: int
    num_experts: int  # 0 in a dense model
    experts_per_token: int
    attention: Weights  # projections of one layer
    norms_and_router: Weights  # of one layer; not split over GPUs
    mlp: Weights  # of one layer, or one expert of it
    embedding: Weights
    final_norm: Weights
    lm_head: Weights
    tied_embeddings: bool  # the LM head reads the embedding's weights

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to the whole sequence."""
        return self.num_layers - self.num_sliding_layers

    def shape(self, page_size: int) -> DecodeShape:
        """The attention shape of a layer on this GPU."""
        return DecodeShape(self.num_q_heads, self.num_kv_heads, self.head_dim, page_size)


def layer_weights(model: ModelSpec, experts: float | None = None) -> Weights:
    """One layer with `experts` of its experts (all by default; a dense model has one MLP)."""
    count = (model.num_experts if experts is None else experts) if model.num_experts else 1
    return model.attention + model.norms_and_router + model.mlp.times(count)


def total_weights(model: ModelSpec) -> Weights:
    """All of a model's weights on one GPU; with tensor_parallel 1 its published parameter count."""
    head = Weights() if model.tied_embeddings else model.lm_head
    return layer_weights(model).times(model.num_layers) + model.embedding + model.final_norm + head


def active_weights(model: ModelSpec) -> Weights:
    """What one token passes through: chosen experts only, LM head included, embedding left out."""
    layer = layer_weights(model, model.experts_per_token)
    return layer.times(model.num_layers) + model.final_norm + model.lm_head


def weight_bytes(model: ModelSpec) -> float:
    """Memory that the weights take on one GPU."""
    return total_weights(model).bytes


def kv_bytes_per_token(model: ModelSpec) -> int:
    """KV cache of one token over all layers of one GPU, sliding layers kept whole as paged pools keep them."""
    return model.num_layers * 2 * model.num_kv_heads * model.head_dim * KV_ELEMENT_BYTES


def experts_touched(model: ModelSpec, tokens: Any) -> Any:
    """Experts of a layer that a step of `tokens` tokens (number or array) reads, in expectation over routers that
    choose evenly: E (1 - (1 - k/E)^tokens). 1 in a dense model."""
    if not model.num_experts:
        return np.ones_like(np.asarray(tokens, np.float64))[()]
    missed = (1 - model.experts_per_token / model.num_experts) ** np.asarray(tokens, np.float64)
    return (model.num_experts * (1 - missed))[()]


def decode_weight_bytes(model: ModelSpec, batch: Any) -> Any:
    """Weight bytes that a step over `batch` tokens (number or array, >= 1) reads on one GPU, LM head included."""
    fixed = (model.attention.bytes + model.norms_and_router.bytes) * model.num_layers
    rows = model.embedding.bytes / model.vocab_size * np.asarray(batch, np.float64)
    experts = model.num_layers * model.mlp.bytes * experts_touched(model, batch)
    return (fixed + experts + rows + model.final_norm.bytes + model.lm_head.bytes)[()]


def flops_per_token(model: ModelSpec, *, lm_head: bool = True) -> int:
    """FLOPs of one token through the matrices of all layers on one GPU, attention itself left out.

    Prefill needs the LM head for a prompt's last token only.
    """
    return active_weights(model).flops - (0 if lm_head else model.lm_head.flops)
