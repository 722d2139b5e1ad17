"""The model: tokens to logits, layer by layer, with attention left to an executor."""
from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear, rms_norm, silu

from gpu.serve.attention import Attention
from gpu.serve.model_config import ModelConfig
from gpu.serve.weights import LayerWeights, Weights


class Decoder:
    """A dense decoder. Its calls allocate, launch and return: they can be captured."""

    __slots__ = ("config", "weights")

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

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
        x = rms_norm(x, x.shape[1:], self.weights.norm, self.config.norm_eps)
        return linear(x, self.weights.head)

    def _layer(self, index: int, layer: LayerWeights, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Adds the layer to x [n, h] in place."""
        c, eps = self.config, self.config.norm_eps
        mixed = linear(rms_norm(x, x.shape[1:], layer.input_norm, eps), layer.qkv, layer.qkv_bias)
        heads = mixed.view(len(x), -1, c.head_dim)
        q, k, v = heads.split((c.num_q_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None:
            q, k = (rms_norm(part, part.shape[2:], norm, eps) for part, norm in ((q, layer.q_norm), (k, layer.k_norm)))
        attended = attention.attend(index, q, k, v)
        x = _add_product(x, attended.view(len(x), -1), layer.out, layer.out_bias)
        normed = rms_norm(x, x.shape[1:], layer.mlp_norm, eps)
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=1)
        return _add_product(x, silu(gate) * up, layer.down, layer.down_bias)


def _add_product(x: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor,
                 bias: torch.Tensor | None) -> torch.Tensor:
    """x [n, h] += factor @ weight.T + bias, the product and the sum in one kernel."""
    x.addmm_(factor, weight.t())
    return x if bias is None else x.add_(bias)
