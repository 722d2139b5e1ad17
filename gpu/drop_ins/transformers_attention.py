"""The attention implementation "pkv" of Transformers: prefill by PyTorch, decode steps by our kernel on pages.

    from gpu.drop_ins.transformers_attention import register
    from gpu.drop_ins.transformers_cache import PagedCache

    register()
    model.set_attn_implementation("pkv")
    cache = PagedCache(model.config, max_batch_size=8, max_seq_len=4096)
    model.generate(**inputs, max_new_tokens=20, **cache.argument_of(model))
"""
from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gpu.drop_ins.refusals import check_served
from gpu.drop_ins.torch_decode import decode_attention
from gpu.drop_ins.transformers_cache import NewTokens, PagedKeys, PagedLayer

DENSE_LOGITS = 1 << 28  # float32 logits at a time, 1 GiB


def register(name: str = "pkv") -> None:
    """Makes the implementation and its masks known to Transformers under `name`. May be called again."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    *, q_length: int, attention_mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor | None:
    """SDPA's mask, except for decode steps: [batch_size, 1, 1, 1] bool, whether the new token is no padding.

    The cache knows which of the older tokens are. Arguments are those that Transformers gives to every mask function.
    """
    if q_length != 1:
        return sdpa_mask(q_length=q_length, attention_mask=attention_mask, **kwargs)
    return None if attention_mask is None else attention_mask[:, None, None, -1:]


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None, **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer's new tokens over the cache and themselves.

    Returns ([batch_size, new_tokens, num_q_heads, head_dim], None).

    query [batch_size, num_q_heads, new_tokens, head_dim]; key, value [batch_size, num_kv_heads, new_tokens, head_dim],
    from PagedCache.update(), or without any cache. The rest as Transformers gives it to every implementation.

    Raises ValueError or NotImplementedError naming the argument.
    """
    for name, given in (("dropout", dropout), ("position_bias", position_bias)):
        check_served(name, given)

    def prefill(key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        return dense_attention(query, key, value, mask, scale=scaling, soft_cap=softcap, sinks=s_aux), None

    if not isinstance(key, PagedKeys):
        if key.shape[2] != query.shape[2]:
            raise ValueError("past_key_values: expected a gpu.drop_ins.transformers_cache.PagedCache, which generate() "
                             "does not make by itself, got another cache")
        return prefill(key, value, attention_mask)
    layer, key = key.layer, key.as_subclass(torch.Tensor)
    new_tokens, seen = key.shape[2], layer.seen
    step = layer.store(key, value, _kept(attention_mask, new_tokens, seen))
    selected = layer.selection is not None and layer.selection.serves(layer.index, window=sliding_window)
    if selected:
        layer.selection.keep(layer.index, query.shape[1], layer.keys, layer.rows.lens, layer.rows.table, new_tokens)
    if new_tokens == 1 and selected:
        rows, sinks = layer.rows, None if s_aux is None else s_aux.detach().float()
        out = layer.selection.attend(layer.index, query[:, :, 0].contiguous(), layer.keys, layer.values, rows.lens,
                                     rows.table, scale=scaling, soft_cap=softcap, sinks=sinks)
        return out[:, None], None
    if new_tokens == 1:
        rows = layer.rows
        out, _ = decode_attention(query[:, :, 0], layer.keys, layer.values, rows.table, rows.lens, scaling,
                                  sliding_window, softcap, None if s_aux is None else s_aux.detach().float())
        return out[:, None], None
    if seen:
        key, value, attention_mask = _with_past(layer, step, sliding_window)
    return prefill(key, value, attention_mask)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scale: float | None,
    soft_cap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft-capped logits or sinks, which SDPA has not: [batch_size, new_tokens, num_q_heads, head_dim].

    query [batch_size, num_q_heads, new_tokens, head_dim]; key, value [batch_size, num_kv_heads, tokens, head_dim]; mask
    [batch_size, 1, new_tokens, tokens] bool, None: causal, of new tokens alone; sinks [num_q_heads]. Queries are taken
    some at a time, so that their float32 logits stay within DENSE_LOGITS.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch_size, heads, new_tokens, _ = query.shape
    key, value = (new.repeat_interleave(heads // new.shape[1], 1) for new in (key, value))
    if mask is None:
        mask = torch.ones(new_tokens, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    outs, some = [], max(1, DENSE_LOGITS // (batch_size * heads * key.shape[2]))
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
    return torch.cat(outs, 2).transpose(1, 2).contiguous()


def _kept(mask: torch.Tensor | None, new_tokens: int, seen: int) -> torch.Tensor | None:
    """Which of the new tokens are no padding, [batch_size, new_tokens] bool: those that see themselves. None: all."""
    if mask is None:
        return None
    width = 1 if new_tokens == 1 else seen + new_tokens
    if mask.dtype != torch.bool or mask.shape[1:] != (1, new_tokens, width):
        raise ValueError(f"attention_mask: expected one mask [batch_size, tokens] for all heads and queries, got "
                         f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}")
    return mask[:, 0].diagonal(width - new_tokens, 1, 2)


def _with_past(
    layer: PagedLayer, step: NewTokens, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(keys, values, mask) of the rows as stored, for several new tokens on a cache that is not empty."""
    key, value = layer.dense(layer.rows.columns_in_use)
    place = torch.arange(key.shape[2], device=key.device)
    ends = step.ends[:, :, None]
    seen = place < ends if window is None else (place < ends) & (place >= ends - window)
    return key, value, seen[:, None]
