"""A Llama from a GGUF file in PyTorch, whose decode steps read chosen tokens of each KV head."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Of a decode step: (layer, q [num_q_heads, head_dim], cache) -> the tokens that each KV head reads, or None for all.
Chooser = Callable[[int, torch.Tensor, "Cache"], "list[torch.Tensor] | None"]
WINDOW = 32  # queries of a prompt's end that are kept, for methods that ask them


@dataclass(slots=True)
class Cache:
    """Keys, rotated, and values of one sequence: [num_kv_heads, room, head_dim] by layer, of which `length` are
    there."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    length: int
    window_q: list[torch.Tensor] = field(default_factory=list)  # [num_q_heads, WINDOW, head_dim] by layer

    def keys(self, layer: int) -> torch.Tensor:
        return self.k[layer][:, : self.length]

    def values(self, layer: int) -> torch.Tensor:
        return self.v[layer][:, : self.length]

    def cut(self, length: int) -> None:
        """Forgets what came after so many tokens."""
        self.length = length


class Llama:
    """Weights in float32 (or `dtype`) on one device."""

    def __init__(self, gguf: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(gguf)

        def told(key: str) -> Any:
            return reader.fields[key].contents()

        self.weights = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
                        .to(device, dtype) for tensor in reader.tensors}  # fmt: skip
        self.device, self.dtype = device, dtype
        self.layers, self.heads = told("llama.block_count"), told("llama.attention.head_count")
        self.kv_heads = told("llama.attention.head_count_kv")
        self.head_dim = told("llama.embedding_length") // self.heads
        self.eps, self.theta = told("llama.attention.layer_norm_rms_epsilon"), told("llama.rope.freq_base")
        self.tokens, self.merges = told("tokenizer.ggml.tokens"), told("tokenizer.ggml.merges")

    def tokenizer(self):
        """Its byte-pair encoding as a tokenizers.Tokenizer."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        made = Tokenizer(models.BPE({token: i for i, token in enumerate(self.tokens)},
                                    [tuple(merge.split(" ", 1)) for merge in self.merges]))
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                      pre_tokenizers.ByteLevel(add_prefix_space=False)])
        made.decoder = decoders.ByteLevel()
        return made

    def output_projection(self, layer: int) -> torch.Tensor:
        """[num_q_heads, head_dim, hidden]"""
        weight = self.weights[f"blk.{layer}.attn_output.weight"]
        return weight.T.reshape(self.heads, self.head_dim, -1)

    @torch.inference_mode()
    def prefill(self, ids: list[int], room: int) -> tuple[torch.Tensor, Cache]:
        """(logits [vocabulary] after the last token, cache with room for so many more tokens)."""
        count = len(ids)
        x = self.weights["token_embd.weight"][torch.tensor(ids, device=self.device)]
        cache = Cache([], [], count)
        for layer in range(self.layers):
            q, k, v = self._project(layer, x, torch.arange(count, device=self.device))
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None].repeat_interleave(self.heads // self.kv_heads, 1),
                v[None].repeat_interleave(self.heads // self.kv_heads, 1), is_causal=True)[0]
            for made, new in ((cache.k, k), (cache.v, v)):
                made.append(torch.cat((new, new.new_zeros(self.kv_heads, room, self.head_dim)), dim=1))
            cache.window_q.append(q[:, -WINDOW:].clone())
            x = self._after(layer, x, attended.transpose(0, 1).reshape(count, -1))
        return self._logits(x[-1:])[0], cache

    @torch.inference_mode()
    def decode(self, token: int, cache: Cache, choose: Chooser | None = None) -> torch.Tensor:
        """Logits [vocabulary] after one more token, which joins the cache."""
        x = self.weights["token_embd.weight"][torch.tensor([token], device=self.device)]
        at = torch.tensor([cache.length], device=self.device)
        cache.length += 1
        for layer in range(self.layers):
            q, k, v = self._project(layer, x, at)
            cache.k[layer][:, at], cache.v[layer][:, at] = k, v
            chosen = None if choose is None else choose(layer, q[:, 0], cache)
            x = self._after(layer, x, self._attend(q[:, 0], cache, layer, chosen).reshape(1, -1))
        return self._logits(x)[0]

    def _attend(self, q: torch.Tensor, cache: Cache, layer: int, chosen: list[torch.Tensor] | None) -> torch.Tensor:
        """[num_q_heads, head_dim] of queries alike."""
        keys, values = cache.keys(layer), cache.values(layer)
        out = []
        for head, own in enumerate(q.view(self.kv_heads, -1, self.head_dim)):
            k, v = keys[head], values[head]
            if chosen is not None:
                k, v = k[chosen[head]], v[chosen[head]]
            out.append(torch.softmax(own @ k.T * self.head_dim**-0.5, dim=-1) @ v)
        return torch.cat(out)

    def _project(
        self, layer: int, x: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """q, k (rotated) and v of normalised inputs, [heads, tokens, head_dim] each."""
        h = self._norm(x, f"blk.{layer}.attn_norm.weight")
        q, k, v = (torch.nn.functional.linear(h, self.weights[f"blk.{layer}.attn_{name}.weight"])
                   .view(len(x), -1, self.head_dim).transpose(0, 1) for name in "qkv")
        return self._rotate(q, at), self._rotate(k, at), v

    def _rotate(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """GGUF's order: pairs of neighbours rotate together."""
        pairs = torch.arange(0, self.head_dim, 2, device=self.device, dtype=torch.float64)
        angles = at[:, None] * self.theta ** (-pairs / self.head_dim)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def _after(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        linear, weights = torch.nn.functional.linear, self.weights
        x = x + linear(attended, weights[f"blk.{layer}.attn_output.weight"])
        h = self._norm(x, f"blk.{layer}.ffn_norm.weight")
        gate = torch.nn.functional.silu(linear(h, weights[f"blk.{layer}.ffn_gate.weight"]))
        up = linear(h, weights[f"blk.{layer}.ffn_up.weight"])
        return x + linear(gate * up, weights[f"blk.{layer}.ffn_down.weight"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return torch.nn.functional.linear(self._norm(x, "output_norm.weight"), head).float()
