"""A Transformers cache whose keys and values lie in pages; gpu.drop_ins.transformers_attention fills and reads it.

Only tokens that the attention mask keeps are stored, so left-padded, right-padded and unpadded rows are all rows of
their true length.
"""
from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from gpu.drop_ins.torch_append import append_tokens
from gpu.drop_ins.transformers_rows import NewTokens, PagedRows

LAYER_TYPES = ("full_attention", "sliding_attention")


class PagedKeys(torch.Tensor):
    """A step's new keys on their way through the model to the attention function, with the layer to store them in."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    layer: PagedLayer


class PagedLayer(CacheLayerMixin):
    """One layer's pages, [num_pages, num_kv_heads, page_size, head_dim] each of K and V."""

    is_sliding = False

    def __init__(self, rows: PagedRows) -> None:
        super().__init__()
        self.rows = rows
        self.seen = 0  # tokens a row that went through, padding included

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
        if self.seen == self.rows.seen:
            self.rows.extend(kept, batch_size, new_tokens, keys.device)
        if self.seen + new_tokens != self.rows.seen:
            raise RuntimeError(f"past_key_values: expected a layer that saw {self.rows.seen - new_tokens} tokens, got "
                               f"one that saw {self.seen}; reset() a cache after a step that failed")
        step = self.rows.step
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
        self.seen = 0
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def copy_pages(self, from_ids: torch.Tensor, to_ids: torch.Tensor) -> None:
        """Page to_ids[i] becomes what page from_ids[i] was; both [n] int64, which may have ids in common."""
        if self.is_initialized:
            for pages in (self.keys, self.values):
                pages[to_ids] = pages[from_ids]

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("crop: a PagedCache only grows, so it does not serve assisted decoding")


class PagedCache(Cache):
    """The cache of model.generate() and forward() under the attention implementation "pkv".

    >>> register()  # of gpu.drop_ins.transformers_attention
    >>> model.set_attn_implementation("pkv")
    >>> cache = PagedCache(model.config, max_batch_size=8, max_seq_len=4096)
    >>> model.generate(**inputs, max_new_tokens=20, **cache.argument_of(model))

    The mask may pad a row's tokens anywhere; it must not change for tokens that were stored. reset() empties the cache
    for another batch.
    """

    def __init__(self, config: PreTrainedConfig, *, max_batch_size: int, max_seq_len: int, page_size: int = 16,
                 num_pages: int | None = None, rows_per_prompt: int = 1) -> None:
        """
        config: the model's. max_batch_size: rows, those of num_return_sequences or num_beams counted. max_seq_len:
        tokens of a row, padding not counted. num_pages: of each layer's pool, by default enough for every row to be
        full. The pools are made where and of what type the first keys are.
        rows_per_prompt: neighbouring rows that begin with one prompt, as generate() makes them with
        num_return_sequences or num_beams. They share the prompt's full pages, which a decode step reads once where that
        is worth it, and which num_pages need not count for each.

        Raises ValueError naming the argument, NotImplementedError for layers without plain attention.
        """
        config = config.get_text_config(decoder=True)
        for layer_type in getattr(config, "layer_types", None) or ():
            if layer_type not in LAYER_TYPES:
                raise NotImplementedError(f"config: expected layers of {' or '.join(LAYER_TYPES)}, got {layer_type}")
        if num_pages is None:
            num_pages = max_batch_size * -(-max_seq_len // page_size)
        self.rows = PagedRows(max_batch_size=max_batch_size, max_seq_len=max_seq_len, page_size=page_size,
                              num_pages=num_pages, rows_per_prompt=rows_per_prompt)
        super().__init__(layers=[PagedLayer(self.rows) for _ in range(config.num_hidden_layers)])

    @property
    def num_free_pages(self) -> int:
        return self.rows.num_free_pages

    def argument_of(self, model: PreTrainedModel) -> dict[str, PagedCache]:
        """The cache under the name by which the model takes one: `cache` where its Transformers has it, and
        `past_key_values`, which newer versions warn about, before."""
        takes = inspect.signature(model.forward).parameters
        return {"cache" if "cache" in takes else "past_key_values": self}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row r becomes what row beam_idx[r] was, as beam search asks; both are of one prompt. Copies what rows do not
        share."""
        copies = self.rows.reorder(beam_idx.to(self.rows.lens.device))
        for layer in self.layers:
            layer.copy_pages(*copies)

    def reset(self) -> None:
        """Empties the cache: all pages are free again."""
        super().reset()
        self.rows.reset()
