"""Attention over pages, as the decoder asks for it: what an executor does, and the one that PyTorch computes anywhere.

The cache is the same whoever computes: K and V pages [num_pages, num_kv_heads, page_size, head_dim] for each layer.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu.serve.model.config import ModelConfig
from gpu.serve.step import Chunk
from pkvsim import AttentionOptions
from pkvsim.devices.route_options import why_not
from pkvsim.kv_types import KV_DTYPES, SCALE_BYTES
from pkvsim.reference.append import INT8_STEPS

FP8_LIMITS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # largest finite values


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """A step's rows: those that decode, then those of `chunks`. Tokens are in the same order."""

    seq_lens: torch.Tensor  # [rows] int32, the step's own tokens included; 0: the row pads the step
    block_table: torch.Tensor  # [rows, max_pages] int32
    token_offsets: torch.Tensor | None  # [rows + 1] int32, where rows' tokens begin; None: a token each
    num_decode: int
    chunks: list[Chunk]


def kernel_options(config: ModelConfig, kv_dtype: str) -> AttentionOptions:
    """What our decode kernels are asked for, on pages of that type."""
    return AttentionOptions(window=config.window).with_cache(kv_dtype if kv_dtype in KV_DTYPES else None, None)


def check_kernels(config: ModelConfig, *, page_size: int, kv_dtype: str) -> None:
    """ValueError where no kernel of ours decodes the model on such pages, which needs no GPU to be known."""
    reason = why_not("balanced", config.shape(page_size), kernel_options(config, kv_dtype))
    if reason is not None:
        raise ValueError(f"model: expected one that our kernels decode, got {config.name}: {reason}")


class Attention(Protocol):
    """An executor."""

    def begin(self, rows: StepRows) -> None:
        """Takes a step's rows; what it plans serves all layers."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Appends the step's tokens to the layer's pages, rotated, and attends to them.

        q [tokens, num_q_heads, head_dim], k, v [tokens, num_kv_heads, head_dim], not rotated yet and free to be
        overwritten. Returns [tokens, num_q_heads, head_dim]. All tokens are written before any is read, since a row may
        begin with pages that another row of the same step fills.
        """


class KVPages:
    """Pages of all layers. Of 8 bits they hold value / scale: FP8 with a scale of 1, int8 with one a token and head."""

    __slots__ = ("num_pages", "page_size", "dtype", "k", "v", "k_scales", "v_scales")

    def __init__(self, config: ModelConfig, *, num_pages: int, page_size: int, kv_dtype: str, device: str) -> None:
        """kv_dtype: "float16", "bfloat16", "float32", or one of pkvsim.kv_types.KV_DTYPES (FP8 is kept as uint8)."""
        self.num_pages, self.page_size, self.dtype = num_pages, page_size, kv_dtype
        stored = torch.uint8 if kv_dtype in FP8_LIMITS else getattr(torch, kv_dtype)
        page = config.num_kv_heads, page_size, config.head_dim
        both = torch.zeros((config.num_layers, 2, num_pages, *page), dtype=stored, device=device)
        self.k, self.v = ([layer[side] for layer in both] for side in (0, 1))
        self.k_scales: list[torch.Tensor] = []  # [num_pages, num_kv_heads, page_size] float32 a layer, of int8 pages
        self.v_scales: list[torch.Tensor] = []
        if kv_dtype == "int8":
            scales = torch.ones((2, config.num_layers, num_pages, *page[:2]), dtype=torch.float32, device=device)
            self.k_scales, self.v_scales = (list(side) for side in scales)

    def write(self, layer: int, page: torch.Tensor, slot: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Puts k, v [tokens, num_kv_heads, head_dim] into slots [tokens] of pages [tokens], int64. Rounds as
        pkvsim.reference.append does."""
        for pages, scales, x in ((self.k, self.k_scales, k), (self.v, self.v_scales, v)):
            if self.dtype == "int8":
                scale = x.float().abs().amax(-1) / INT8_STEPS
                scales[layer][page, :, slot] = scale
                x = (x.float() / scale.clamp_min(1e-30)[..., None]).round().to(torch.int8)
            elif self.dtype in FP8_LIMITS:
                limit = FP8_LIMITS[self.dtype]
                x = x.float().clamp(-limit, limit).to(getattr(torch, self.dtype)).view(torch.uint8)
            pages[layer][page, :, slot] = x.to(pages[layer].dtype)

    def read(self, layer: int, page_ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(K, V) [num_kv_heads, length, head_dim] of the first `length` tokens of pages [n] int64; 8-bit ones as
        float32."""
        found = []
        for pages, scales in ((self.k, self.k_scales), (self.v, self.v_scales)):
            values = pages[layer][page_ids]
            if self.dtype == "int8":
                values = values * scales[layer][page_ids][..., None]
            elif self.dtype in FP8_LIMITS:
                values = values.view(getattr(torch, self.dtype)).float()
            found.append(values.transpose(0, 1).flatten(1, 2)[:, :length])
        return found[0], found[1]


def page_bytes(config: ModelConfig, *, page_size: int, kv_dtype: str) -> int:
    """Bytes of one page in all layers, scales included."""
    element = 1 if kv_dtype in KV_DTYPES else torch.empty(0, dtype=getattr(torch, kv_dtype)).element_size()
    head = config.head_dim * element + (SCALE_BYTES if kv_dtype == "int8" else 0)
    return 2 * config.num_layers * config.num_kv_heads * head * page_size


def attend_to(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None) -> torch.Tensor:
    """Causal attention of q [n, Hq, d], the last n tokens of k, v [Hkv, length, d]: [n, Hq, d] by PyTorch."""
    n, length = len(q), k.shape[1]
    group = q.shape[1] // k.shape[0]
    k, v = (part.to(q.dtype).repeat_interleave(group, dim=0)[None] for part in (k, v))
    windowed = window is not None and window < length
    mask = causal_mask(n, length, window=window, device=q.device) if n > 1 or windowed else None
    out = scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask)
    return out[0].transpose(0, 1)


def causal_mask(n: int, length: int, *, window: int | None, device: torch.device) -> torch.Tensor:
    """[n, length] bool: which of `length` keys each of the last n tokens attends to."""
    position = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


class TorchAttention:
    """PyTorch's operations over the pages, row by row: on any device, and what the kernels are compared with."""

    __slots__ = ("pages", "_inv_freq", "_factor", "_window", "_where", "_there", "_spans")

    def __init__(self, config: ModelConfig, pages: KVPages) -> None:
        self.pages = pages
        self._inv_freq = torch.from_numpy(config.rope.inv_freq).float().to(pages.k[0].device)
        self._factor, self._window = config.rope.factor, config.window
        self._where: tuple[torch.Tensor, ...] = ()
        self._there: torch.Tensor | None = None
        self._spans: list[tuple[int, int, torch.Tensor, int]] = []

    def begin(self, rows: StepRows) -> None:
        lens = rows.seq_lens.cpu().numpy().astype(np.int64)
        counts = np.ones(len(lens), np.int64)
        counts[rows.num_decode :] = [len(chunk.tokens) for chunk in rows.chunks]
        ends = np.cumsum(counts)
        row = np.repeat(np.arange(len(lens)), counts)
        position = np.arange(ends[-1]) - np.repeat(ends, counts) + np.repeat(lens, counts)
        device, page_size = rows.seq_lens.device, self.pages.page_size
        there = position >= 0  # a row of length 0 pads the step
        self._there = None if there.all() else torch.from_numpy(there).to(device)
        positions, row = torch.from_numpy(np.maximum(position, 0)).to(device), torch.from_numpy(row).to(device)
        page = rows.block_table[row, positions // page_size].long()
        # Angles as Transformers computes them, in float32, so that tokens can be compared.
        angles = (positions.float()[:, None] * self._inv_freq[None])[:, None]
        self._where = page, positions % page_size, angles.cos() * self._factor, angles.sin() * self._factor
        self._spans = [
            (int(end - count), int(end), rows.block_table[at, : -(-length // page_size)].long(), int(length))
            for at, (end, count, length) in enumerate(zip(ends, counts, lens.tolist())) if length
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        page, slot, cosine, sine = self._where
        q, k = (rotate(part.float(), cosine, sine).to(part.dtype) for part in (q, k))
        if self._there is None:
            self.pages.write(layer, page, slot, k, v)
        else:
            self.pages.write(layer, *(part[self._there] for part in (page, slot, k, v)))
        out = torch.zeros_like(q)
        for begin, end, ids, length in self._spans:
            out[begin:end] = attend_to(q[begin:end], *self.pages.read(layer, ids, length), window=self._window)
        return out


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, d] turned by angles whose cosines and sines are [tokens, 1, d / 2], halves together."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
