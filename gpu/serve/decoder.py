"""The model: tokens to logits, layer by layer, with attention and matrix products left to executors."""
from __future__ import annotations

import torch
from torch.nn.functional import embedding, rms_norm

from gpu.serve.attention import Attention
from gpu.serve.model.config import ModelConfig
from gpu.serve.model.products import Products
from gpu.serve.model.weights import LayerWeights, Weights


class Decoder:
    """A dense decoder. Its calls allocate, launch and return: they can be captured once they have run."""

    __slots__ = ("config", "weights", "products")

    def __init__(self, config: ModelConfig, weights: Weights, products: Products) -> None:
        self.config, self.weights, self.products = config, weights, products

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    def hidden(self, tokens: torch.Tensor, attention: Attention) -> torch.Tensor:
        """What the last layer leaves of tokens [n] int64, in the order that `attention` was told of: [n, h]."""
        x = embedding(tokens, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            x = self._layer(index, layer, x, attention)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[n, vocab_size] of hidden states [n, h]."""
        return self.products.normed(x, self.weights.norm, self.weights.head, None)

    def _layer(self, index: int, layer: LayerWeights, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Adds the layer to x [n, h] in place."""
        c, products = self.config, self.products
        mixed = products.normed(x, layer.input_norm, layer.qkv, layer.qkv_bias)
        heads = mixed.view(len(x), -1, c.head_dim)
        q, k, v = heads.split((c.num_q_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None:
            norms = (q, layer.q_norm), (k, layer.k_norm)
            q, k = (rms_norm(part, part.shape[2:], norm, c.norm_eps) for part, norm in norms)
        attended = attention.attend(index, q, k, v)
        x = products.add(x, attended.view(len(x), -1), layer.out, layer.out_bias)
        gated = products.gated(x, layer.mlp_norm, layer.gate_up, layer.gate_up_bias)
        return products.add(x, gated, layer.down, layer.down_bias)
