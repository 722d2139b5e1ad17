"""A Llama from a GGUF file in PyTorch, whose decode steps read chosen tokens of each KV head."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

WINDOW = 32  # queries of a prompt's end that are kept, for methods that ask them
QUERIES_AT_ONCE = 256  # of a prompt, whose attention is summed


@dataclass(slots=True)
class Cache:
    """What a prompt left: keys, rotated, and values [num_kv_heads, tokens, head_dim] by layer."""

    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)
    window_q: list[torch.Tensor] = field(default_factory=list)  # [num_q_heads, WINDOW, head_dim] by layer
    masses: list[torch.Tensor] = field(default_factory=list)  # [num_q_heads, tokens], the attention of all queries

    @property
    def length(self) -> int:
        return self.k[0].shape[1]


class LayerStep(NamedTuple):
    """A layer's new tokens in each variant of a block."""

    q: torch.Tensor  # [variants, num_kv_heads, group_size, new_tokens, head_dim]
    logits: torch.Tensor  # [variants, num_kv_heads, group_size, new_tokens, tokens], causal
    keys: torch.Tensor  # [num_kv_heads, tokens - new_tokens, head_dim], the prompt's
    new_keys: torch.Tensor  # [variants, num_kv_heads, new_tokens, head_dim]

    @property
    def tokens(self) -> int:
        return self.logits.shape[-1]

    def of(self, variants: list[int] | slice) -> LayerStep:
        return LayerStep(self.q[variants], self.logits[variants], self.keys, self.new_keys[variants])


# Which tokens each variant's KV heads see in a layer, bool [variants, num_kv_heads, new_tokens, tokens].
Chooser = Callable[[int, LayerStep], torch.Tensor]


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
    def prefill(self, ids: list[int], *, masses: bool = False) -> Cache:
        """The cache of a prompt; masses: with the attention that its queries gave each token."""
        count = len(ids)
        x = self.weights["token_embd.weight"][torch.tensor(ids, device=self.device)]
        cache, at = Cache(), torch.arange(count, device=self.device)
        for layer in range(self.layers):
            q, k, v = self._project(layer, x, at)
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None].repeat_interleave(self.heads // self.kv_heads, 1),
                v[None].repeat_interleave(self.heads // self.kv_heads, 1), is_causal=True)[0]
            cache.k.append(k)
            cache.v.append(v)
            cache.window_q.append(q[:, -WINDOW:].clone())
            if masses:
                cache.masses.append(self._masses(q, k))
            x = self._after(layer, x, attended.transpose(0, 1).reshape(count, -1))
        return cache

    def _masses(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(q.shape[:2], device=self.device)
        for begin in range(0, q.shape[1], QUERIES_AT_ONCE):
            some = q[:, begin : begin + QUERIES_AT_ONCE]
            total[:, : begin + some.shape[1]] += window_attention(some, k[:, : begin + some.shape[1]]).sum(1)
        return total

    @torch.inference_mode()
    def block(self, ids: list[int], cache: Cache, choose: Chooser | None = None, *, variants: int = 1,
              last: int | None = None) -> torch.Tensor:
        """Logits [variants, last, vocabulary] after each of the last of these tokens, which follow the cache's in
        decode steps: each sees the prompt and the tokens before it as `choose` says for its variant, by default all.

        The steps of all variants go through the model together, layer by layer, since their tokens are known.
        """
        new, before, group = len(ids), cache.length, self.heads // self.kv_heads
        embedded = self.weights["token_embd.weight"][torch.tensor(ids, device=self.device)]
        x = embedded.repeat(variants, 1)  # [variants * new, hidden]
        at = torch.arange(before, before + new, device=self.device).repeat(variants)
        later = torch.ones(new, new, dtype=torch.bool, device=self.device).triu(1)
        for layer in range(self.layers):
            q, k, v = (some.unflatten(1, (variants, new)).transpose(0, 1) for some in self._project(layer, x, at))
            q = q.unflatten(1, (self.kv_heads, group))  # [variants, num_kv_heads, group_size, new, head_dim]
            old = torch.einsum("bhgsd,htd->bhgst", q, cache.k[layer])
            own = torch.einsum("bhgsd,bhtd->bhgst", q, k).masked_fill(later, -torch.inf)
            logits = torch.cat((old, own), -1).float() * self.head_dim**-0.5
            if choose is not None:
                seen = choose(layer, LayerStep(q, logits, cache.k[layer], k))
                logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
            weights = torch.softmax(logits, dim=-1).to(self.dtype)
            attended = torch.einsum("bhgst,htd->bhgsd", weights[..., :before], cache.v[layer])
            attended = attended + torch.einsum("bhgst,bhtd->bhgsd", weights[..., before:], v)
            x = self._after(layer, x, attended.permute(0, 3, 1, 2, 4).reshape(variants * new, -1))
        x = x.unflatten(0, (variants, new))
        return self._logits(x if last is None else x[:, -last:])

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
        wide = x.float()  # squares of 16 bits may pass their range
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weights[name]

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return torch.nn.functional.linear(self._norm(x, "output_norm.weight"), head).float()


def window_attention(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal weights [num_q_heads, queries, tokens] of queries [num_q_heads, queries, head_dim], those of the last
    tokens of keys [num_kv_heads, tokens, head_dim]."""
    grouped = q.unflatten(0, (len(keys), -1)).flatten(1, 2)
    logits = (grouped @ keys.mT).float().view(*q.shape[:2], -1) * q.shape[-1] ** -0.5
    queries, tokens = logits.shape[1:]
    at = torch.arange(tokens, device=q.device)
    hidden = at > tokens - queries + torch.arange(queries, device=q.device)[:, None]
    return torch.softmax(logits.masked_fill_(hidden, -torch.inf), dim=-1)
