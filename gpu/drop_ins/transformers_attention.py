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

from gpu.drop_ins.flash_attn.dense import dense_attention
from gpu.drop_ins.refusals import check_served
from gpu.drop_ins.torch_decode import decode_attention
from gpu.drop_ins.transformers_layer import PagedKeys, PagedLayer
from gpu.drop_ins.transformers_rows import NewTokens


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
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
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
        out, _ = dense_attention(query, key, value, mask, scale=scaling, soft_cap=softcap, sinks=s_aux)
        return out, None

    if not isinstance(key, PagedKeys):
        if key.shape[2] != query.shape[2]:
            raise ValueError("past_key_values: expected a gpu.drop_ins.transformers_cache.PagedCache, which generate() "
                             "does not make by itself, got another cache")
        return prefill(key, value, attention_mask)
    layer, key = key.layer, key.as_subclass(torch.Tensor)
    new_tokens, seen = key.shape[2], layer.seen
    step = layer.store(key, value, _kept(attention_mask, new_tokens, seen))
    if layer.heads is not None:
        for name, given in (("window after an eviction", sliding_window), ("s_aux after an eviction", s_aux)):
            check_served(name, given)
        if new_tokens == 1:
            out = layer.heads.decode(query[:, :, 0], layer.keys, layer.values, scale=scaling, soft_cap=softcap)
            return out[:, None], None
        key, value, attention_mask = layer.heads.dense(layer.keys, layer.values, layer.ends, query.shape[1])
        return prefill(key, value, attention_mask)
    selected = layer.selection is not None and layer.selection.serves(layer.index, window=sliding_window)
    if selected:
        selected = layer.selection.keep(layer.index, query.shape[1], layer.keys, layer.rows.lens, layer.rows.table,
                                        new_tokens, bounds=layer.rows.bounds)
    if new_tokens == 1 and selected:
        rows, sinks = layer.rows, None if s_aux is None else s_aux.detach().float()
        out = layer.selection.attend(layer.index, query[:, :, 0].contiguous(), layer.keys, layer.values, rows.lens,
                                     rows.table, scale=scaling, soft_cap=softcap, sinks=sinks)
        return out[:, None], None
    if new_tokens == 1:
        rows = layer.rows
        groups = rows.groups if rows.groups is not None and sliding_window is None else (None, None)
        out, _ = decode_attention(query[:, :, 0], layer.keys, layer.values, rows.table, rows.lens, scaling,
                                  sliding_window, softcap, None if s_aux is None else s_aux.detach().float(), *groups)
        return out[:, None], None
    if seen:
        key, value, attention_mask = _with_past(layer, step, sliding_window)
    return prefill(key, value, attention_mask)


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
