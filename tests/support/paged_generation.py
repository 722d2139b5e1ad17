"""generate() of small models on the CPU, by Transformers' own attention or over pages of four tokens."""
from __future__ import annotations

import torch

from gpu.drop_ins.transformers_cache import PagedCache


def generate(model, inputs: dict, implementation: str, *, new_tokens: int = 12, **options: object) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)


def cache_for(model, inputs: dict, *, new_tokens: int = 12, **options: object) -> PagedCache:
    batch_size, width = inputs["input_ids"].shape
    return PagedCache(model.config, max_batch_size=batch_size, max_seq_len=width + new_tokens,
                      **{"page_size": 4, **options})
