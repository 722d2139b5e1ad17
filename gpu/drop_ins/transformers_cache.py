"""A Transformers cache whose keys and values lie in pages; gpu.drop_ins.transformers_attention fills and reads it.

Only tokens that the attention mask keeps are stored, so left-padded, right-padded and unpadded rows are all rows of
their true length.
"""
from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from gpu.cache.prompts.prompt_pool import PromptPool
from gpu.cache.tiers.handles import LoadHandle, StoreHandle
from gpu.drop_ins.transformers_layer import PagedLayer
from gpu.drop_ins.transformers_prompts import check_positions, row_tokens
from gpu.drop_ins.transformers_rows import PagedRows
from pkvsim.memory.blocks.block_keys import block_keys

LAYER_TYPES = ("full_attention", "sliding_attention")


class PagedCache(Cache):
    """The cache of model.generate() and forward() under the attention implementation "pkv".

    >>> register()  # of gpu.drop_ins.transformers_attention
    >>> model.set_attn_implementation("pkv")
    >>> cache = PagedCache(model.config, max_batch_size=8, max_seq_len=4096)
    >>> model.generate(**inputs, max_new_tokens=20, **cache.argument_of(model))

    The mask may pad a row's tokens anywhere; it must not change for tokens that were stored. reset() empties the cache
    for another batch.

    With tiers, what a pool has of the prompts is loaded and not computed again:

    >>> cache = PagedCache(model.config, max_batch_size=8, max_seq_len=4096, tiers=pool)
    >>> cache.begin(model, **inputs)
    >>> found = model.generate(**inputs, max_new_tokens=20, **cache.argument_of(model))
    >>> cache.keep(found, inputs["attention_mask"])
    """

    def __init__(self, config: PreTrainedConfig, *, max_batch_size: int, max_seq_len: int, page_size: int = 16,
                 num_pages: int | None = None, rows_per_prompt: int = 1, selection: str | None = None,
                 budget: float = 0.1, dense_layers: int = 2, summary_dtype: str | None = None,
                 always_select: bool = False,
                 tiers: PromptPool | None = None) -> None:
        """
        config: the model's. max_batch_size: rows, those of num_return_sequences or num_beams counted. max_seq_len:
        tokens of a row, padding not counted. num_pages: of each layer's pool, by default enough for every row to be
        full. The pools are made where and of what type the first keys are.
        rows_per_prompt: neighbouring rows that begin with one prompt, as generate() makes them with
        num_return_sequences or num_beams. They share the prompt's full pages, which a decode step reads once where that
        is worth it, and which num_pages need not count for each.
        selection: "mean_std", "centroids" or "quest": decode steps read the `budget` part of each row's pages that
        scores best, for every KV head others, in all but the first dense_layers layers and those with windows; prefill
        reads all. Not with several rows per prompt. Steps in which that does not pay on this GPU read all pages, by
        price (pkvsim.policy.selecting); always_select: none does, nor on a GPU whose prices nobody knows.
        summary_dtype: of the pages' summaries by which selection scores: None, for that of the pages, or "uint8", for
        8-bit codes, which are half the bytes. None without selection, and of centroids, which are 4-bit codes.
        tiers: where prompts' KV is kept beyond the pages. Not with several rows per prompt, nor with selection.

        Raises ValueError naming the argument, NotImplementedError for layers without plain attention.
        """
        self.tiers = tiers
        self._config = config = config.get_text_config(decoder=True)
        if tiers is not None:
            check_positions(config)
        for layer_type in getattr(config, "layer_types", None) or ():
            if layer_type not in LAYER_TYPES:
                raise NotImplementedError(f"config: expected layers of {' or '.join(LAYER_TYPES)}, got {layer_type}")
        if num_pages is None:
            num_pages = max_batch_size * -(-max_seq_len // page_size)
        self.rows = PagedRows(max_batch_size=max_batch_size, max_seq_len=max_seq_len, page_size=page_size,
                              num_pages=num_pages, rows_per_prompt=rows_per_prompt)
        self.selection = None
        if selection is None and summary_dtype is not None:
            raise ValueError(f"summary_dtype: expected None without selection, got {summary_dtype!r}")
        if selection is not None:
            from gpu.routes.router import this_device
            from gpu.selection.paged_selection import PagedSelection

            if rows_per_prompt != 1:
                raise ValueError(f"rows_per_prompt: expected 1 with selection, got {rows_per_prompt}")
            self.selection = PagedSelection(selection, budget, dense_layers=dense_layers, summary_dtype=summary_dtype,
                                            device=None if always_select else this_device())
        if tiers is not None and (rows_per_prompt != 1 or selection is not None):
            raise ValueError("tiers: expected None with several rows per prompt, and with selection")
        self._loads: list[LoadHandle] = []
        self._stores: list[StoreHandle] = []
        count = config.num_hidden_layers
        super().__init__(layers=[PagedLayer(self.rows, self._loads, at, at == count - 1, self.selection)
                                 for at in range(count)])

    @property
    def num_free_pages(self) -> int:
        return self.rows.num_free_pages

    def argument_of(self, model: PreTrainedModel) -> dict[str, PagedCache]:
        """The cache under the name by which the model takes one: `cache` where its Transformers has it, and
        `past_key_values`, which newer versions warn about, before."""
        takes = inspect.signature(model.forward).parameters
        return {"cache" if "cache" in takes else "past_key_values": self}

    def evict(self, layer: int, kept: Sequence[Sequence[object]]) -> int:
        """After a forward pass: in one layer, head h of row r keeps its pages at the places `kept[r][h]`,
        ascending integers, and gives the others back to the layer's pool; returns how many pages of one head these are.
        Steps go on with true positions over what is kept. Once all layers have evicted, tokens take pages in them
        alone, so that num_pages bounds what is kept.

        pkvsim.selection.evictions gives such places, and gpu.drop_ins.kvpress_presses those of a press. Raises
        ValueError naming the argument, also with selection, tiers or several rows per prompt.
        """
        if self.selection is not None or self.tiers is not None or self.rows.rows_per_prompt != 1:
            raise ValueError("kept: expected a cache without selection, tiers and several rows per prompt")
        own = self.layers[layer]
        if own.heads is None:
            if not own.seen:
                raise ValueError("kept: expected a layer with tokens, got an empty one")
            own.heads = self.rows.by_head(own.keys.shape[1])
        gone = own.heads.evict(kept)
        self.rows.evicted = all(other.heads is not None for other in self.layers)
        return gone

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row r becomes what row beam_idx[r] was, as beam search asks; both are of one prompt. Copies what rows do not
        share."""
        copies = self.rows.reorder(beam_idx.to(self.rows.lens.device))
        for layer in self.layers:
            layer.copy_pages(*copies)

    def begin(self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
              **others: object) -> int:
        """Loads what the tiers have of the beginnings of prompts [batch_size, tokens] into an empty cache; returns the
        leading columns of input_ids that need not be computed. generate() and forward() go on from there: generate()
        takes the whole input_ids, forward() what follows these columns.

        Layers arrive while earlier ones are computed; where a tier fails, and where the pool knows that computing is
        faster, fewer columns are loaded. others: of a
        tokenizer, which may say nothing about the tokens. Raises ValueError naming the argument, also where prompts are
        more than their tokens, such as images: the tiers know blocks by their tokens alone.
        """
        tiers = self._tiers()
        for name, value in others.items():
            if value is not None and not (name == "token_type_ids" and not torch.as_tensor(value).any()):
                raise ValueError(f"{name}: expected input_ids and attention_mask alone, by which tiers know a prompt")
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids: expected integers [batch_size, tokens], got {input_ids.dtype} "
                             f"{list(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask: expected {list(input_ids.shape)}, got {list(attention_mask.shape)}")
        if self.get_seq_length():
            raise ValueError("begin: expected an empty cache, reset() it")
        self._open(model)
        mask = None if attention_mask is None else attention_mask.cpu()
        ends = torch.ones_like(input_ids, device="cpu") if mask is None else (mask != 0).long()
        ends = ends.cumsum(1)  # [batch_size, tokens], of each row up to and including a column
        page_size, rows = self.rows.page_size, row_tokens(input_ids, mask)
        keys = [block_keys(tokens, page_size) for tokens in rows]
        known = [tiers.lookup(of, tiers.compute_s(len(tokens), page_size)) for of, tokens in zip(keys, rows)]
        seen = self._columns(ends, known)
        if not seen:
            return 0
        kept = None if mask is None else (mask[:, :seen] != 0).to(model.device)
        self.rows.extend(kept, len(input_ids), seen, model.device)
        counts = (-(-ends[:, seen - 1] // self.rows.page_size)).tolist()
        valid = [0] * len(keys)
        try:
            for row, count in enumerate(counts):
                if count:
                    self._loads.append(tiers.load(keys[row][:count], self.rows.pages_of(row, count)))
            loads = iter(self._loads)
            for row, count in enumerate(counts):
                valid[row] = next(loads).wait_layer(0) if count else 0
        except BaseException:  # rows would count tokens that are not there, and pages be handed out under copies
            self.reset()
            raise
        found = self._columns(ends[:, :seen + 1], valid)
        if found < seen:  # a tier failed: what it did not give is computed
            self.rows.shorten(ends[:, found - 1] if found else torch.zeros_like(ends[:, 0]), found)
        for layer in self.layers:
            layer.seen = found
        return found

    def keep(self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Stores the rows' whole pages in the tiers, as far as they are not there; returns how many blocks are being
        written. token_ids [batch_size, tokens]: what was computed, such as generate()'s answer, of which the last
        token may be missing from the cache. attention_mask [batch_size, prompt tokens]: the prompts'; tokens behind it
        are no padding. Raises ValueError naming the argument."""
        tiers = self._tiers()
        if self.rows.lens is None or token_ids.ndim != 2 or len(token_ids) != len(self.rows.lens):
            raise ValueError(f"token_ids: expected the cache's rows, got {list(token_ids.shape)}")
        if attention_mask is not None and (
            attention_mask.ndim != 2 or len(attention_mask) != len(token_ids)
            or attention_mask.shape[1] > token_ids.shape[1]
        ):  # fmt: skip
            raise ValueError(f"attention_mask: expected of the first of {list(token_ids.shape)} tokens, got "
                             f"{list(attention_mask.shape)}")
        self._open_pages(tiers)
        mask = None
        if attention_mask is not None:
            mask = torch.ones_like(token_ids, device="cpu")
            mask[:, :attention_mask.shape[1]] = attention_mask.cpu()
        blocks = 0
        for row, (tokens, length) in enumerate(zip(row_tokens(token_ids, mask), self.rows.lens.tolist())):
            if length > len(tokens):
                raise ValueError(f"token_ids: expected the {length} tokens of row {row}, got {len(tokens)}")
            keys = block_keys(tokens[:length], self.rows.page_size)
            self._stores.append(tiers.store(keys, self.rows.pages_of(row, len(keys))))
            blocks += self._stores[-1].blocks
        return blocks

    def reset(self) -> None:
        """Empties the cache: all pages are free again, once loads have ended and what is kept has been copied."""
        for load in self._loads:
            load.cancel()
        for store in self._stores:
            store.wait_copied()
        self._loads.clear()
        self._stores.clear()
        if self.tiers is None or not self.tiers.is_open:
            super().reset()
        else:  # pages of zeros would be written beside copies of the next load
            for layer in self.layers:
                layer.restart()
        self.rows.reset()
        if self.selection is not None:
            self.selection.reset()

    def _tiers(self) -> PromptPool:
        if self.tiers is None:
            raise ValueError("tiers: expected a PromptPool with begin() and keep(), got none")
        return self.tiers

    def _columns(self, ends: torch.Tensor, blocks: list[int]) -> int:
        """Leading columns of which every row's tokens are in its first blocks; not all, as a query is needed."""
        room = torch.tensor(blocks)[:, None] * self.rows.page_size
        fits = (ends <= room).all(0)[:-1]
        return int(fits.long().cumprod(0).sum())

    def _open(self, model: PreTrainedModel) -> None:
        """The pages, before the first keys come, and the tiers behind them."""
        config = self._config
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in self.layers:
            if not layer.is_initialized:
                empty = torch.empty((1, heads, 0, head_dim), dtype=model.dtype, device=model.device)
                layer.lazy_initialization(empty, empty)
        self._open_pages(self._tiers())

    def _open_pages(self, tiers: PromptPool) -> None:
        """Puts the tiers behind the pages, unless they are. ValueError where they are behind another cache's."""
        if not tiers.serves(self.layers[0].keys):
            tiers.open([layer.keys for layer in self.layers], [layer.values for layer in self.layers])
