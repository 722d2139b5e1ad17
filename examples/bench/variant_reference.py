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
    return attention_of_draws(q[None], k_pages, v_pages, layout, page_ids, length, options, sinks)[0]


def attention_of_draws(
    draws: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, layout: str, page_ids: np.ndarray, length: int,
    options: AttentionOptions, sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As attention_of_row, of several draws of the row's queries [draws, ..] at once.

    One KV head follows the other, so that only one head's keys and values are in float64 at a time.
    """
    if layout == "NHD":
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    num_kv_heads, page_size = k_pages.shape[1:3]
    ids = torch.from_numpy(page_ids[:-(-length // page_size)].astype(np.int64)).to(draws.device)
    group_size, head_dim = draws.shape[-2] // num_kv_heads, draws.shape[-1]
    queries = draws.double().view(len(draws), -1, num_kv_heads, group_size, head_dim)  # [draws, tokens, Hkv, G, d]
    tokens = queries.shape[1]
    place = torch.arange(length, device=draws.device)
    ends = torch.arange(length - tokens + 1, length + 1, device=draws.device)[:, None]
    seen = place < ends
    if options.window is not None:
        seen &= place >= ends - options.window
    outs = []
    for head in range(num_kv_heads):
        k, v = (pool[ids, head].flatten(0, 1)[:length].double() for pool in (k_pages, v_pages))  # [length, d]
        logits = queries[:, :, head] @ k.T * head_dim**-0.5  # [draws, tokens, G, length]
        if options.soft_cap is not None:
            logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
        logits = logits.masked_fill(~seen[:, None], float("-inf"))
        if sinks is not None:
            sink = sinks.view(num_kv_heads, -1, 1)[head].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], dim=-1)
        outs.append(torch.softmax(logits, dim=-1)[..., :length] @ v)
    return torch.stack(outs, dim=2).reshape(*draws.shape[:-1], -1)
