"""FlashAttention's KV caches as the engine reads them: pages, a table of them, and how long rows are."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from gpu.drop_ins.flash_attn.checks import check_tensor, describe, expect
from pkvsim.devices.route_options import MAX_PAGE_SIZE


class CachePages(NamedTuple):
    """A cache of a step's rows."""

    k: torch.Tensor  # [num_pages, page_size, num_kv_heads, head_dim], a view
    v: torch.Tensor  # the same with V's head_dim
    block_table: torch.Tensor  # [batch_size, max_pages] int32; entries past a row's end may hold anything

    @property
    def max_tokens(self) -> int:
        """That a row has room for."""
        return self.block_table.shape[1] * self.k.shape[1]


def pages_of(k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor | None,
             cache_batch_idx: torch.Tensor | None, batch_size: int) -> CachePages:
    """The cache of `batch_size` rows.

    With block_table [batch_size, max_pages] int32: k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim].
    Without: [batch_size of the cache, tokens, ..], row r being entry r, or cache_batch_idx[r], int32 [batch_size]; such
    an entry is cut into the longest pages of at most MAX_PAGE_SIZE tokens that fill it.

    Raises ValueError naming the argument.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, "a tensor of 4 axes", cache, 4)
    expect("v_cache", f"k_cache's {list(k_cache.shape[:3])} and a head_dim", describe(v_cache),
           v_cache.shape[:3] == k_cache.shape[:3])
    if block_table is not None:
        expect("cache_batch_idx", "None with a block_table", describe(cache_batch_idx), cache_batch_idx is None)
        expect("block_table", f"int32 [{batch_size}, max_pages] on {k_cache.device}", describe(block_table),
               isinstance(block_table, torch.Tensor) and block_table.dtype == torch.int32 and block_table.dim() == 2
               and (len(block_table), block_table.device) == (batch_size, k_cache.device))
        return CachePages(k_cache, v_cache, block_table if block_table.stride(1) == 1 else block_table.contiguous())
    entries, tokens = k_cache.shape[:2]
    expect("k_cache", "at least one token a row", describe(k_cache), tokens > 0)
    page_size = next(size for size in range(min(tokens, MAX_PAGE_SIZE), 0, -1) if tokens % size == 0)
    per_row = tokens // page_size
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(name, "rows that follow each other without a gap, or a block_table", f"strides {cache.stride()}",
               per_row == 1 or entries == 1 or cache.stride(0) == tokens * cache.stride(1))
    k_pages, v_pages = (
        cache.as_strided((entries * per_row, page_size, *cache.shape[2:]),
                         (page_size * cache.stride(1) if per_row > 1 else cache.stride(0), *cache.stride()[1:]))
        for cache in (k_cache, v_cache))
    if cache_batch_idx is None:
        expect("k_cache", f"the {batch_size} rows of q, or more", describe(k_cache), entries >= batch_size)
        table = torch.arange(batch_size * per_row, dtype=torch.int32, device=k_cache.device)
        return CachePages(k_pages, v_pages, table.view(batch_size, per_row))
    expect("cache_batch_idx", f"int32 [{batch_size}] on {k_cache.device}", describe(cache_batch_idx),
           isinstance(cache_batch_idx, torch.Tensor) and cache_batch_idx.dtype == torch.int32
           and (cache_batch_idx.shape, cache_batch_idx.device) == ((batch_size,), k_cache.device))
    first = cache_batch_idx[:, None] * per_row
    return CachePages(k_pages, v_pages, first + torch.arange(per_row, dtype=torch.int32, device=k_cache.device))


def lengths_of(cache_seqlens: int | torch.Tensor | None, cache: CachePages, batch_size: int) -> torch.Tensor:
    """Tokens of each row that are in the cache, [batch_size] int32; all that it has room for where nobody says.

    Raises ValueError naming cache_seqlens.
    """
    if cache_seqlens is None or isinstance(cache_seqlens, (int, np.integer)) and not isinstance(cache_seqlens, bool):
        tokens = cache.max_tokens if cache_seqlens is None else int(cache_seqlens)
        return torch.full((batch_size,), tokens, dtype=torch.int32, device=cache.k.device)
    expect("cache_seqlens", f"a number or int32 [{batch_size}] on {cache.k.device}", describe(cache_seqlens),
           isinstance(cache_seqlens, torch.Tensor) and cache_seqlens.dtype in (torch.int32, torch.int64)
           and (cache_seqlens.shape, cache_seqlens.device) == ((batch_size,), cache.k.device))
    return cache_seqlens.to(torch.int32).contiguous()
