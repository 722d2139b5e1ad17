"""One layer of a PagedCache: its pages, and a step's new tokens on their way into them."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from gpu.cache.tiers.handles import LoadHandle
from gpu.drop_ins.torch_append import append_tokens
from gpu.drop_ins.transformers_heads import HeadRows
from gpu.drop_ins.transformers_rows import NewTokens, PagedRows

if TYPE_CHECKING:
    from gpu.selection.paged_selection import PagedSelection


class PagedKeys(torch.Tensor):
    """A step's new keys on their way through the model to the attention function, with the layer to store them in."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    layer: PagedLayer


class PagedLayer(CacheLayerMixin):
    """One layer's pages, [num_pages, num_kv_heads, page_size, head_dim] each of K and V."""

    is_sliding = False

    def __init__(self, rows: PagedRows, loads: list[LoadHandle], at: int, is_last: bool,
                 selection: PagedSelection | None = None) -> None:
        """loads: under way, of which this is layer `at`; the last one ends them."""
        super().__init__()
        self.rows, self.index, self.selection = rows, at, selection
        self._loads, self._is_last = loads, is_last
        self.seen = 0  # tokens a row that went through, padding included
        self.heads: HeadRows | None = None  # after an eviction
        self.ends: torch.Tensor | None = None  # of the last step's tokens in these

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, heads, _, head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            raise ValueError(f"value_states: expected the keys' {list(key_states.shape)}, "
                             f"got {list(value_states.shape)}")
        # Zeros, as a prefill may multiply what no row owns by a weight of zero.
        pages = key_states.new_zeros((2, self.rows.num_pages, heads, self.rows.page_size, head_dim))
        self.keys, self.values = pages
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they came, [batch_size, num_kv_heads, new_tokens, head_dim].

        Which of them are padding is known in the attention function, which calls store().
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states.as_subclass(PagedKeys)
        keys.layer = self
        return keys, value_states

    @torch.no_grad()
    def store(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor | None) -> NewTokens:
        """Writes a step's tokens into the pages. The first layer of a step makes room for all of them.

        keys, values as update() returned them; kept [batch_size, new_tokens] bool: no padding; None: none is.
        """
        batch_size, _, new_tokens, _ = keys.shape
        for load in self._loads:
            load.wait_layer(self.index)
        if self._is_last:
            self._loads.clear()
        if self.seen == self.rows.seen:
            self.rows.extend(kept, batch_size, new_tokens, keys.device)
        if self.seen + new_tokens != self.rows.seen:
            raise RuntimeError(f"past_key_values: expected a layer that saw {self.rows.seen - new_tokens} tokens, got "
                               f"one that saw {self.seen}; reset() a cache after a step that failed")
        step = self.rows.step
        if self.heads is not None:
            self.ends = self.heads.store(keys, values, self.keys, self.values, kept)
            self.seen += new_tokens
            return step
        by_token = [new.transpose(1, 2) for new in (keys, values)]
        k_new, v_new = (every.flatten(0, 1) if step.kept is None else every[step.kept] for every in by_token)
        append_tokens(k_new, v_new, self.keys, self.values, self.rows.table, step.lens, step.offsets)
        self.seen += new_tokens
        return step

    def dense(self, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the rows' first pages, [batch_size, num_kv_heads, num_columns * page_size, head_dim] each of K, V.

        What lies behind a row's end is finite, and nobody's.
        """
        ids = self.rows.table[:, :num_columns].long()
        return tuple(pages[ids].transpose(1, 2).flatten(2, 3) for pages in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.rows.max_seq_len

    def reset(self) -> None:
        self.restart()
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def restart(self) -> None:
        """Empties the layer; what its pages hold stays."""
        self.seen, self.heads, self.ends = 0, None, None

    def copy_pages(self, from_ids: torch.Tensor, to_ids: torch.Tensor) -> None:
        """Page to_ids[i] becomes what page from_ids[i] was; both [n] int64, which may have ids in common."""
        if self.heads is not None:
            raise NotImplementedError("reorder_cache: rows of a PagedCache do not change places after an eviction")
        if self.is_initialized:
            for pages in (self.keys, self.values):
                pages[to_ids] = pages[from_ids]

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("crop: a PagedCache only grows, so it does not serve assisted decoding")
