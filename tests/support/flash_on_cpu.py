"""flash_attn_with_kvcache on the CPU: its engines and writers made of plain torch, and the float64 attention it must be."""
from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch_paged import TorchEngine, append_tokens

from gpu.drop_ins.flash_attn import with_kvcache
from gpu.drop_ins.flash_attn.writing import Writers
from gpu.drop_ins.torch_decode import EngineCache
from pkvsim import DecodeShape
from pkvsim.reference.append import rotate
from pkvsim.reference.rope import Rope


class TorchWriter:
    """CacheWriter of NHD pages, as far as Writers uses one."""

    def __init__(self, shape: DecodeShape, dtype: str, value_dim: int, rope: Rope | None) -> None:
        self.shape, self.dtype, self.value_dim, self.rope = shape, dtype, value_dim, rope

    def append(self, k_new, v_new, k_pages, v_pages, *, seq_lens, block_table, token_offsets=None, q=None, q_out=None):
        assert k_new.shape[1:] == (self.shape.num_kv_heads, self.shape.head_dim) and k_new.dim() == v_new.dim() == 3
        assert seq_lens.dtype == block_table.dtype == torch.int32 and str(k_new.dtype) == f"torch.{self.dtype}"
        assert (q is None) == (self.rope is None) and k_pages.shape[1] == self.shape.page_size
        if self.rope is not None:
            tokens = len(k_new) // len(seq_lens)
            at = (seq_lens[:, None] - tokens + torch.arange(tokens)).flatten().clamp(min=0).numpy()
            k_new = torch.from_numpy(rotate(k_new.double().numpy(), at, self.rope)).to(k_new.dtype)
            q_out.copy_(torch.from_numpy(rotate(q.double().numpy(), at, self.rope)).to(q.dtype))
        append_tokens(k_new, v_new, k_pages.transpose(1, 2), v_pages.transpose(1, 2), block_table, seq_lens,
                      token_offsets)


class LenientEngine(TorchEngine):
    """DecodeEngine's kernels take rows of negative length for empty ones."""

    def run(self, *given, **more):
        planned = self.tables
        self.tables = planned[0], planned[1].clamp(min=0)
        try:
            return super().run(*given, **more)
        finally:
            self.tables = planned


def serve_flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """Takes the place of what needs a GPU; the engines that calls will use."""
    engines = EngineCache(LenientEngine, spares=True)
    monkeypatch.setattr(with_kvcache, "ENGINES", engines)
    monkeypatch.setattr(with_kvcache, "WRITERS", Writers(TorchWriter))
    monkeypatch.setattr(with_kvcache, "current_stream", lambda device: contextlib.nullcontext((0, False)))
    return engines


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float | None = None, causal: bool = False,
    window: tuple[int, int] = (-1, -1), softcap: float = 0.0, sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out [queries, q_heads, dim], lse [q_heads, queries]) of one sequence, in float64, as FlashAttention's masks say.

    q [queries, q_heads, dim]; k, v [keys, kv_heads, dim]."""
    queries, heads, dim = q.shape
    keys, right, group = len(k), 0 if causal else window[1], heads // k.shape[1]
    own, place = np.arange(queries)[:, None] + keys - queries, np.arange(keys)
    seen = ((place >= own - window[0]) | (window[0] < 0)) & ((place <= own + right) | (right < 0))  # [queries, keys]
    logits = np.einsum("qhd,khd->hqk", q, k.repeat(group, 1)) * (dim ** -0.5 if scale is None else scale)
    logits = np.where(seen, softcap * np.tanh(logits / softcap) if softcap else logits, -np.inf)
    ends = logits if sinks is None else np.append(logits, np.broadcast_to(sinks[:, None, None], (heads, queries, 1)), 2)
    lse = np.logaddexp.reduce(ends, axis=2)
    lse[:, ~seen.any(1)] = -np.inf
    weights = np.exp(logits - np.where(np.isfinite(lse), lse, 0)[..., None])
    return np.einsum("hqk,khd->qhd", weights, v.repeat(group, 1)), lse
