"""Attention by plain products of PyTorch, for what its fused kernels have not: soft-capped logits and sinks."""
from __future__ import annotations

import torch

DENSE_LOGITS = 1 << 28  # float32 logits at a time, 1 GiB


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scale: float | None,
    soft_cap: float | None, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [batch_size, new_tokens, num_q_heads, head_dim], lse [batch_size, num_q_heads, new_tokens] float32).

    query [batch_size, num_q_heads, new_tokens, head_dim]; key, value [batch_size, num_kv_heads, tokens, head_dim]; mask
    [batch_size, 1, new_tokens, tokens] bool, None: causal, of new tokens alone; sinks [num_q_heads]. Queries are taken
    some at a time, so that their float32 logits stay within DENSE_LOGITS.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch_size, heads, new_tokens, _ = query.shape
    key, value = (new.repeat_interleave(heads // new.shape[1], 1) for new in (key, value))
    if mask is None:
        mask = torch.ones(new_tokens, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    outs, sums, some = [], [], max(1, DENSE_LOGITS // max(1, batch_size * heads * key.shape[2]))
    for begin in range(0, new_tokens, some):
        end = begin + some
        logits = (query[:, :, begin:end] @ key.transpose(2, 3)).float() * scale
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        logits = logits.masked_fill(~mask[:, :, begin:end], torch.finfo(torch.float32).min)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(batch_size, -1, logits.shape[2], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1)[..., :key.shape[2]]
        outs.append(weights.to(value.dtype) @ value)
        sums.append(logits.logsumexp(-1))
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), torch.cat(sums, 2)
