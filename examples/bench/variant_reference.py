"""Attention of one row with any options, in float64, on any device: what benchmarks check against."""
from __future__ import annotations

import numpy as np
import torch

from pkvsim.options import AttentionOptions


def attention_of_row(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, layout: str, page_ids: np.ndarray, length: int,
    options: AttentionOptions, sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Float64 attention of a row's queries [(query_tokens,) num_q_heads, head_dim], like them but for V's head_dim."""
    if layout == "NHD":
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    num_kv_heads, page_size = k_pages.shape[1:3]
    ids = torch.from_numpy(page_ids[:-(-length // page_size)].astype(np.int64)).to(q.device)
    k, v = (
        pool[ids].transpose(0, 1).flatten(1, 2)[:, :length].double() for pool in (k_pages, v_pages)
    )  # [Hkv, length, d]
    queries = q.double().view(-1, num_kv_heads, q.shape[-2] // num_kv_heads, q.shape[-1])  # [tokens, Hkv, G, d]
    logits = torch.einsum("thgd,hnd->thgn", queries, k) * q.shape[-1] ** -0.5
    if options.soft_cap is not None:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    place = torch.arange(length, device=q.device)
    ends = torch.arange(length - len(queries) + 1, length + 1, device=q.device)[:, None]
    seen = place < ends
    if options.window is not None:
        seen &= place >= ends - options.window
    logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
    if sinks is not None:
        sink = sinks.view(1, num_kv_heads, -1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :length]
    return torch.einsum("thgn,hnd->thgd", weights, v).reshape(*q.shape[:-1], -1)
