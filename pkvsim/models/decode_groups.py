"""A model's decode attention as groups of equal layers, each with the shape and options that kernels are asked for."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.models.model_spec import CHUNKED, FULL, SLIDING, AttentionSpec, ModelSpec
from pkvsim.options import AttentionOptions
from pkvsim.shapes import DecodeShape

GROUPED = (FULL, SLIDING, CHUNKED)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Layers of one attention on one GPU. shape and options are None where no paged grouped-query kernel serves it
    (latent, compressed, state): those cost the larger of decode_read_bytes at the memory's bandwidth and decode_flops
    at the peak's efficiency, an assumption until measured."""

    attention: AttentionSpec
    count: int  # layers
    shape: DecodeShape | None
    options: AttentionOptions | None

    def kernel_lens(self, contexts: np.ndarray) -> np.ndarray:
        """Lengths [batch_size] to hand to a kernel for rows of `contexts` tokens: a sliding window is the kernel's own
        affair (options.window), chunks and selected blocks are shorter rows to it."""
        if self.attention.kind == SLIDING or not (self.attention.kind == CHUNKED or self.attention.selected_entries):
            return contexts
        return np.array([self.attention.read_entries(int(context)) for context in contexts], contexts.dtype)


def decode_groups(
    model: ModelSpec, page_size: int, *, kv_dtype: str | None = None, query_tokens: int = 1
) -> tuple[DecodeGroup, ...]:
    """Every kind of attention of the model, in the order in which each first appears; counts add up to the layers that
    have attention or a state. kv_dtype and query_tokens as in AttentionOptions. Raises ValueError as that does."""
    return tuple(
        DecodeGroup(attention, count, *_kernel(attention, page_size, kv_dtype, query_tokens))
        for attention, count in model.attention_groups
    )


def _kernel(
    attention: AttentionSpec, page_size: int, kv_dtype: str | None, query_tokens: int
) -> tuple[DecodeShape | None, AttentionOptions | None]:
    if attention.kind not in GROUPED:
        return None, None
    options = AttentionOptions(
        window=attention.window if attention.kind == SLIDING else None,
        soft_cap=attention.soft_cap or None,
        sinks=attention.sinks,
        query_tokens=query_tokens,
        v_head_dim=attention.value_dim if attention.value_dim != attention.head_dim else None,
        kv_dtype=kv_dtype,
    )
    return DecodeShape(attention.num_q_heads, attention.num_kv_heads, attention.head_dim, page_size), options
