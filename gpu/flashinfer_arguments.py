"""What FlashInfer lets its arguments be, brought to one form."""
from __future__ import annotations

import torch


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(given: str | torch.dtype | None) -> torch.dtype:
    if isinstance(given, torch.dtype):
        return given
    if isinstance(given, str):
        return getattr(torch, given)
    raise TypeError(f"q_data_type: expected a string or torch.dtype, got {type(given).__name__}")


def pages_of(
    cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, V) as views [num_pages, num_kv_heads, page_size, head_dim]; pages of one token may leave its axis out."""
    if not isinstance(cache, (tuple, torch.Tensor)):
        raise KeyError(f"paged_kv_cache: expected a tensor or a pair of tensors, got {type(cache).__name__}")
    token_axis = -2 if kv_layout == "HND" else -3
    views = []
    for pages in cache if isinstance(cache, tuple) else cache.unbind(1):
        if pages.dim() not in (3, 4):
            raise ValueError(f"paged_kv_cache: expected pages of 4 axes each of K and V, got {list(pages.shape)}")
        pages = pages if pages.dim() == 4 else pages.unsqueeze(token_axis)
        views.append(pages if kv_layout == "HND" else pages.transpose(-3, -2))
    k_pages, v_pages = views
    return k_pages, v_pages
