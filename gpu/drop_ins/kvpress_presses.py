"""Presses of NVIDIA's kvpress decide what a PagedCache keeps of its prompts.

    from kvpress import SnapKVPress

    from gpu.drop_ins.kvpress_presses import pressed

    with pressed(SnapKVPress(compression_ratio=0.8), model, cache):
        model(input_ids, **cache.argument_of(model))       # the prompt, without the question
    model.generate(...)                                    # goes on from what is kept

A press scores tokens and says how many each layer keeps. Here pages are kept, those of the largest mean score, as many
as hold so many tokens; with pages of one token they are the tokens that the press itself keeps. The others go back to
the layer's pool.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from gpu.drop_ins.transformers_cache import PagedCache


@contextmanager
def pressed(press: object, model: PreTrainedModel, cache: PagedCache) -> Iterator[None]:
    """Within it, a forward pass of prompts into the empty cache evicts, layer by layer, what the press would.

    press: a kvpress.ScorerPress, PyramidKVPress's budgets included. Its own context is entered, so that it prepares the
    model as it does by itself; its hooks are ours meanwhile. The prompts must be of one length, without padding.

    Raises ValueError naming press; the forward pass raises ValueError naming what an eviction does not go with.
    """
    if not all(callable(getattr(press, name, None)) for name in ("score", "compress", "__call__")):
        raise ValueError(f"press: expected a ScorerPress of kvpress, got {type(press).__name__}")

    def hook(module: torch.nn.Module, inputs: object, kwargs: dict, output: tuple) -> tuple:
        layer, tokens = cache.layers[module.layer_idx], kwargs["hidden_states"].shape[1]
        if layer.seen != tokens or layer.heads is not None:
            return output  # these are no prompts, or were
        if getattr(module, "sliding_window", None) is not None:
            raise ValueError(f"press: expected layers without windows, got layer {module.layer_idx} with one of "
                             f"{module.sliding_window}")
        if bool((cache.rows.lens != tokens).any()):
            raise ValueError("attention_mask: expected prompts without padding with a press")
        keys, values = (every[:, :, :tokens] for every in layer.dense(cache.rows.columns_in_use))
        scores, count = scores_of(press, module, kwargs["hidden_states"], keys, values, output[1], kwargs)
        if scores is not None:
            cache.evict(module.layer_idx, kept_pages(scores, count, cache.rows.page_size))
        return output

    press.forward_hook = hook
    try:
        with press(model):
            yield
    finally:
        del press.forward_hook


def scores_of(press: object, *given: object) -> tuple[torch.Tensor | None, int]:
    """(scores [batch_size, num_kv_heads, tokens], tokens that a head keeps) of a layer; None where nothing goes.

    given: as the press's compress() takes them, which says by what it returns how many it keeps.
    """
    found, score = [], press.score

    def recorded(*args: object, **kwargs: object) -> torch.Tensor:
        found.append(score(*args, **kwargs))
        return found[-1]

    press.score = recorded
    try:
        keys, _ = press.compress(*given)
    finally:
        del press.score
    return (found[-1] if found else None), keys.shape[2]


def kept_pages(scores: torch.Tensor, count: int, page_size: int) -> list[list[np.ndarray]]:
    """Places of the pages of each row's heads, ascending: those of the largest mean scores, as many as hold `count`
    tokens. scores [batch_size, num_kv_heads, tokens]."""
    tokens = scores.shape[2]
    pages = -(-tokens // page_size)
    sums = torch.nn.functional.pad(scores, (0, pages * page_size - tokens)).unflatten(2, (pages, page_size)).sum(3)
    sizes = torch.full((pages,), page_size, device=scores.device)
    sizes[-1] = tokens - (pages - 1) * page_size
    # The order of equal scores is that of torch.topk, as the presses have it.
    kept = (sums / sizes).topk(-(-count // page_size), dim=-1).indices.sort(dim=-1).values
    return [list(row) for row in kept.cpu().numpy()]
