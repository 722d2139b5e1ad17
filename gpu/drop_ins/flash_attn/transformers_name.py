"""Our functions under a name of Transformers' that its continuous batching takes for FlashAttention 2.

    from gpu.flash_attn import register_with_transformers

    register_with_transformers()
    model.set_attn_implementation("pkv_flash_2")
    model.generate_batch(inputs, generation_config)

Continuous batching keeps its own pages and gives a decode step's block tables to whatever stands behind a name with
"flash" and "2" in it. Transformers loads that in one function, which is made to answer for ours.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

from gpu.drop_ins.flash_attn.prefill import flash_attn_func, flash_attn_varlen_func
from gpu.drop_ins.flash_attn.with_kvcache import flash_attn_with_kvcache

NAME = "pkv_flash_2"
PAGED = "paged|"  # before the names of continuous batching up to Transformers 5.17


def register_with_transformers() -> None:
    """Makes NAME an attention implementation. May be called again.

    Raises RuntimeError where Transformers loads FlashAttention otherwise than 5.17 to 5.24 do.
    """
    from transformers import AttentionInterface, modeling_flash_attention_utils
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    paged = AttentionInterface().get(f"{PAGED}flash_attention_2")
    if paged is not None:
        AttentionInterface.register(f"{PAGED}{NAME}", paged)
    if not hasattr(modeling_flash_attention_utils, "_lazy_imports"):
        raise RuntimeError("transformers: expected 5.17 to 5.24, which load FlashAttention by _lazy_imports, got "
                           "another version")
    load = modeling_flash_attention_utils._lazy_imports
    if not hasattr(load, "pkv"):
        modeling_flash_attention_utils._lazy_imports = _answering(load)


def _answering(load: Callable) -> Callable:
    """Transformers' loader, but for our names."""
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    @functools.wraps(load)
    def lazy_imports(implementation: str | None, *args: object, **options: object) -> tuple:
        if implementation is not None and implementation.removeprefix(PAGED) == NAME:
            return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, _pad_input, _unpad_input
        return load(implementation, *args, **options)

    lazy_imports.pkv = True
    return lazy_imports
